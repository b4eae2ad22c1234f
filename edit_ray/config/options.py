"""The sections video and prompt_segments, with durations such as `1m30s`."""

import re
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from edit_ray.options import Options
from edit_ray.runs.ids import MAX_SEGMENTS
from edit_ray.runs.run_plan import FrameLayout

MAX_PROMPTS = 10_000
VALID_PROMPTS = f"a list of 1 to {MAX_PROMPTS} entries such as {{start: 0s, prompt: …}} or {{segment: 0, prompt: …}}"
MAX_DURATION_S = 7 * 86400.0

_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE]-[0-9]{1,3})?"
_DURATION = re.compile(rf"(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?")


def parse_duration(value: str) -> float:
    """Seconds of a duration such as `6.5s` or `1m30s`.

    Raises:
        ValueError: no duration, or one beyond `MAX_DURATION_S`.
    """
    match = _DURATION.fullmatch(value.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"{value!r} is no duration such as 6.5s or 2m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if total > MAX_DURATION_S:
        raise ValueError(f"{value!r} is beyond the {MAX_DURATION_S:.0f} seconds that a duration may have")
    return total


def format_duration(seconds: float) -> str:
    """The duration as `parse_duration` reads it back exactly."""
    return f"{int(seconds)}s" if seconds.is_integer() else f"{seconds!r}s"


def _seconds(value: object) -> float:
    # A bare number is refused: whether it means seconds or frames would be a guess. 0 is the same in both.
    if type(value) in (int, float) and value == 0:
        return 0.0
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no duration such as 6.5s or 2m")
    return parse_duration(value)


def _positive_seconds(value: object) -> float:
    seconds = _seconds(value)
    if seconds <= 0:
        raise ValueError("the duration must be above 0s")
    return seconds


def _schema(least: str) -> dict[str, Any]:
    return {"type": "string", "valid": f"a duration with its unit, such as 6.5s or 2m, {least} and at most 7 days"}


_AS_TEXT = PlainSerializer(format_duration, return_type=str)

Instant = Annotated[float, BeforeValidator(_seconds), _AS_TEXT, WithJsonSchema(_schema("at least 0s"))]
"""A point of the video in seconds from its start; given and written as text with its unit."""

Duration = Annotated[float, BeforeValidator(_positive_seconds), _AS_TEXT, WithJsonSchema(_schema("above 0s"))]
"""A length in seconds; given and written as text with its unit."""

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

    `num_segments: null` without a duration means that the run continues until it is stopped.
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
        """Whether the run continues until it is stopped."""
        return self.num_segments is None and self.duration is None


class PromptSegment(Options):
    """A prompt and where it begins: at a second of the video or at a segment. It lasts until the next one.

    So do the other values; by default they are those of `sampling`.
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

    def first_segment(self, layout: FrameLayout) -> int:
        """The segment from which on the prompt is in effect: the one that contains its start."""
        return layout.segment_at(self.start) if self.start is not None else self.segment or 0
