"""The configuration of a run: every layer's options in one frozen model, and what follows from them."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from edit_ray.cache.options import CacheOptions
from edit_ray.config.cross_checks import mistakes_between
from edit_ray.config.mistakes import Mistakes
from edit_ray.config.options import MAX_PROMPTS, VALID_PROMPTS, PromptSegment, VideoOptions
from edit_ray.config.strict_yaml import dump
from edit_ray.engine.options import ContinuityOptions, EngineOptions, ModelOptions, SamplingOptions
from edit_ray.metrics.options import MetricsOptions
from edit_ray.options import Options
from edit_ray.runs.run_plan import FrameLayout, Scene, Storyboard
from edit_ray.tiers.options import StoreOptions
from edit_ray.video.encode import OutputOptions


class Config(Options):
    """Everything that determines a run's video, and how it is made.

    `config.model_dump(mode="json")` and `Config.model_validate` are inverse to each other.

    Raises:
        ValueError: as pydantic's ValidationError, naming every mistake; `load_config` says the same in sentences.
    """

    model: ModelOptions = Field(default_factory=ModelOptions)
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    video: VideoOptions
    # A list is as good as a tuple here: YAML and JSON know no tuples.
    prompt_segments: tuple[PromptSegment, ...] = Field(
        min_length=1, max_length=MAX_PROMPTS, strict=False, json_schema_extra={"valid": VALID_PROMPTS}
    )
    continuity: ContinuityOptions = Field(default_factory=ContinuityOptions)
    # `cache: null` is no cache.
    cache: Annotated[CacheOptions, BeforeValidator(lambda given: {} if given is None else given)] = Field(
        default_factory=CacheOptions
    )
    store: StoreOptions = Field(default_factory=StoreOptions)
    engine: EngineOptions = Field(default_factory=EngineOptions)
    output: OutputOptions = Field(default_factory=OutputOptions)
    metrics: MetricsOptions = Field(default_factory=MetricsOptions)

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if mistakes := list(mistakes_between(self)):
            raise Mistakes(mistakes)
        return self

    @property
    def layout(self) -> FrameLayout:
        """The frames that each segment adds to the video."""
        return layout_of(self.sampling, self.continuity)

    @property
    def num_segments(self) -> int | None:
        """Segments of the run, the fewest that cover `video.duration`; None if it continues until it is stopped."""
        duration = self.video.duration
        return self.video.num_segments if duration is None else self.layout.segments_for(duration)

    @property
    def num_frames_total(self) -> int | None:
        """Frames of the whole video; with `video.duration` they cover it and may last a little longer."""
        return None if self.num_segments is None else self.layout.total_frames(self.num_segments)

    @property
    def storyboard(self) -> Storyboard:
        """What each segment shows: an entry holds from the segment that contains its start, until the next one's."""
        layout, sampling = self.layout, self.sampling
        scenes = tuple(
            Scene(
                start=entry.first_segment(layout),
                prompt=entry.prompt,
                negative_prompt=sampling.negative_prompt if entry.negative_prompt is None else entry.negative_prompt,
                guidance_scale=sampling.guidance_scale if entry.guidance_scale is None else entry.guidance_scale,
                seed=sampling.seed if entry.seed is None else entry.seed,
            )
            for entry in self.prompt_segments
        )
        return Storyboard(scenes, layout)


def layout_of(sampling: SamplingOptions, continuity: ContinuityOptions) -> FrameLayout:
    """The frames that each segment adds.

    Raises:
        ValueError: `num_frames` and `history_latents` do not fit each other.
    """
    return FrameLayout(
        sampling.num_frames,
        continuity.carried_latents,
        sampling.fps,
        init_latents=continuity.preceding_latents,
        denoise_needs_frames=continuity.carried_frames > 0,
    )


def dump_yaml(config: Config, *, empty: bool = False) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one; with the `empty` options, or without."""
    values = config.model_dump(mode="json", exclude_none=True)
    if empty:  # but a scene and the length have only what was given
        values = config.model_dump(mode="json") | {name: values[name] for name in ("video", "prompt_segments")}
    if config.video.endless:
        values["video"] = {"num_segments": None}  # null differs from a missing key here
    return dump(values)
