"""The configuration of a run: every layer's options in one frozen model, and what follows from them."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from edit_ray.cache.options import CacheOptions
from edit_ray.config.cross_checks import cross_field_mistakes
from edit_ray.config.mistakes import Mistakes
from edit_ray.config.scenes import storyboard_of
from edit_ray.config.strict_yaml import dump
from edit_ray.engine.options import ContinuityOptions, EngineOptions, ModelOptions, Picture, SamplingOptions
from edit_ray.metrics.exporter import MetricsOptions
from edit_ray.options import Options
from edit_ray.runs.ids import MAX_SEGMENTS
from edit_ray.runs.run_plan import FrameLayout, Storyboard
from edit_ray.tiers.options import StoreOptions
from edit_ray.video.encode import OutputOptions

MAX_PROMPTS = 10_000
VALID_PROMPTS = f"a list of 1 to {MAX_PROMPTS} entries such as {{start: 0s, prompt: …}} or {{segment: 0, prompt: …}}"
MAX_REFERENCES = 16
VALID_REFERENCES = f"a list of 1 to {MAX_REFERENCES} paths of pictures"
MAX_DURATION_S = 7 * 86400.0

_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE]-[0-9]{1,3})?"
_DURATION = re.compile(rf"(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?")


def parse_duration(value: str) -> float:
    """Seconds of a duration such as `6.5s` or `1m30s`. Raises ValueError."""
    match = _DURATION.fullmatch(value.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"{value!r} is not a duration such as 6.5s or 2m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if total > MAX_DURATION_S:
        raise ValueError(f"{value!r} is beyond the {MAX_DURATION_S:.0f} seconds that a duration may have")
    return total


def format_duration(seconds: float) -> str:
    """The text that `parse_duration` reads back exactly."""
    return f"{int(seconds)}s" if seconds.is_integer() else f"{seconds!r}s"


def _seconds(value: object) -> float:
    # A number without a unit is refused, as it could mean seconds or frames; 0 is the same in both.
    return 0.0 if type(value) in (int, float) and value == 0 else parse_duration(str(value))


def _positive_seconds(value: object) -> float:
    seconds = _seconds(value)
    if seconds <= 0:
        raise ValueError("the duration must be above 0s")
    return seconds


def _schema(least: str) -> dict[str, Any]:
    return {"type": "string", "valid": f"a duration with its unit, such as 6.5s or 2m, {least} and at most 7 days"}


_AS_TEXT = PlainSerializer(format_duration, return_type=str)

Instant = Annotated[float, BeforeValidator(_seconds), _AS_TEXT, WithJsonSchema(_schema("at least 0s"))]
"""Seconds from the start of the video; in files text with a unit."""

Duration = Annotated[float, BeforeValidator(_positive_seconds), _AS_TEXT, WithJsonSchema(_schema("above 0s"))]
"""A length in seconds; in files text with a unit."""

Prompt = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2000,
        pattern=r"\S",
        json_schema_extra={"valid": "text of 1 to 2000 characters that is not blank"},
    ),
]


class VideoOptions(Options):
    """The length of the video: a number of segments, or a duration that they cover.

    With `num_segments: null` and no duration the run continues until it is stopped. With `approve: each` it waits after
    each segment until that is approved or made again.
    """

    num_segments: int | None = Field(default=None, ge=1, le=MAX_SEGMENTS)
    duration: Duration | None = None
    approve: Literal["none", "each"] = "none"

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if self.num_segments is not None and self.duration is not None:
            raise ValueError(
                "has both num_segments and duration; it must have one of them "
                "(--set video.num_segments=null removes one)."
            )
        if self.num_segments is None and self.duration is None and "num_segments" not in self.model_fields_set:
            raise ValueError(
                "has neither num_segments nor duration; it must have one of them "
                "(num_segments: null runs until it is stopped)."
            )
        return self

    @property
    def endless(self) -> bool:
        """Whether the run continues until it is stopped."""
        return self.num_segments is None and self.duration is None


class PromptSegment(Options):
    """A prompt and its start, in seconds or as a segment. It holds until the next entry starts.

    The other values hold as long; their defaults are those of `sampling`, and of `model.loras` for `lora_weights`,
    which are weights by adapter. `image` is the first frame of the entry's
    segments, with `continuity.mode: image` of its first one, with `svi` what they all show. `last_image` is the last
    frame of its last segment. A VACE model shows what is in the `reference_images`.
    """

    start: Instant | None = None
    segment: int | None = Field(default=None, ge=0, lt=MAX_SEGMENTS)
    prompt: Prompt
    negative_prompt: str | None = Field(default=None, max_length=2000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    lora_weights: dict[str, Annotated[float, Field(ge=-10, le=10)]] | None = Field(
        default=None, json_schema_extra={"valid": "numbers from -10 to 10 by the names of adapters"}
    )
    image: Picture | None = None
    last_image: Picture | None = None
    reference_images: tuple[Picture, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_REFERENCES,
        strict=False,
        json_schema_extra={"valid": VALID_REFERENCES},
    )

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if (self.start is None) == (self.segment is None):
            many = "neither" if self.start is None else "both"
            joint = "nor" if self.start is None else "and"
            raise ValueError(
                f"has {many} start {joint} segment; it must have one of them, such as start: 0s or segment: 0."
            )
        return self

    def first_segment(self, layout: FrameLayout) -> int:
        """The segment that contains the prompt's start."""
        return layout.segment_at(self.start) if self.start is not None else self.segment or 0

    @property
    def position(self) -> str:
        """Where the prompt starts, such as `6.5s` or `segment 3`."""
        return f"segment {self.segment}" if self.start is None else format_duration(self.start)


class Config(Options):
    """Everything that determines a run's video and how it is made.

    `Config.model_validate` reads what `config.model_dump(mode="json")` returns.

    Raises:
        ValueError: pydantic's ValidationError with every mistake; `load_config` turns it into sentences.
    """

    model: ModelOptions = Field(default_factory=ModelOptions)
    sampling: SamplingOptions = Field(default_factory=SamplingOptions)
    video: VideoOptions
    # Not strict: YAML and JSON have lists in place of tuples.
    prompt_segments: tuple[PromptSegment, ...] = Field(
        min_length=1, max_length=MAX_PROMPTS, strict=False, json_schema_extra={"valid": VALID_PROMPTS}
    )
    continuity: ContinuityOptions = Field(default_factory=ContinuityOptions)
    # `cache: null` means no cache.
    cache: Annotated[CacheOptions, BeforeValidator(lambda given: {} if given is None else given)] = Field(
        default_factory=CacheOptions
    )
    store: StoreOptions = Field(default_factory=StoreOptions)
    engine: EngineOptions = Field(default_factory=EngineOptions)
    output: OutputOptions = Field(default_factory=OutputOptions)
    metrics: MetricsOptions = Field(default_factory=MetricsOptions)

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if mistakes := list(cross_field_mistakes(self)):
            raise Mistakes(mistakes)
        return self

    @property
    def layout(self) -> FrameLayout:
        """The frames that each segment adds to the video."""
        return layout_of(self.sampling, self.continuity)

    @property
    def num_segments(self) -> int | None:
        """Segments of the run, the fewest that cover `video.duration`; None for an endless run."""
        duration = self.video.duration
        return self.video.num_segments if duration is None else self.layout.segments_for(duration)

    @property
    def num_frames_total(self) -> int | None:
        """Frames of the whole video, None for an endless run; with `video.duration` they may last a little longer."""
        return None if self.num_segments is None else self.layout.total_frames(self.num_segments)

    @property
    def storyboard(self) -> Storyboard:
        """The scene of each segment: an entry holds from the segment of its start until the next entry's."""
        return storyboard_of(self)


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
    """The configuration as YAML that `load_config` reads back to an equal one; with `empty`, unset options as null."""
    values = config.model_dump(mode="json", exclude_none=True)
    if empty:  # except in scenes and the length, which have either of two keys
        values = config.model_dump(mode="json") | {name: values[name] for name in ("video", "prompt_segments")}
    if config.video.endless:
        values["video"] = {"num_segments": None} | values["video"]  # null differs from a missing key here
    return dump(values)
