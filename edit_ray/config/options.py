"""The sections that belong to no layer below: how long the video is, and what it tells."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from edit_ray.config.durations import Duration, Instant
from edit_ray.options import Options
from edit_ray.runs.numbers import MAX_SEGMENTS

MAX_PROMPTS = 10_000
VALID_PROMPTS = f"a list of 1 to {MAX_PROMPTS} entries such as {{start: 0s, prompt: …}} or {{segment: 0, prompt: …}}"

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
    """How long the video is: a number of segments, or a duration that they have to cover.

    `num_segments` given as null, with no duration, means that it goes on until it is stopped.
    """

    num_segments: int | None = Field(default=None, ge=1, le=MAX_SEGMENTS)
    duration: Duration | None = None

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if self.num_segments is not None and self.duration is not None:
            raise ValueError(
                "has both num_segments and duration; it must have one of them "
                "(--set video.num_segments=null takes one away)."
            )
        if self.num_segments is None and self.duration is None and "num_segments" not in self.model_fields_set:
            raise ValueError(
                "has neither num_segments nor duration; it must have one of them "
                "(num_segments: null goes on until it is stopped)."
            )
        return self

    @property
    def endless(self) -> bool:
        """Whether it goes on until it is stopped."""
        return self.num_segments is None and self.duration is None


class PromptSegment(Options):
    """A prompt and where it begins: at a second of the video or at a segment. It lasts until the next one.

    So do the other values; what is not given is that of `sampling`.
    """

    start: Instant | None = None
    segment: int | None = Field(default=None, ge=0, lt=MAX_SEGMENTS)
    prompt: Prompt
    negative_prompt: str | None = Field(default=None, max_length=2000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_one_is_given(self) -> Self:
        if (self.start is None) == (self.segment is None):
            many = "neither" if self.start is None else "both"
            joint = "nor" if self.start is None else "and"
            raise ValueError(
                f"has {many} start {joint} segment; it must have one of them, such as start: 0s or segment: 0."
            )
        return self
