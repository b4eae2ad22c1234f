"""Durations with units: `6.5s`, `2m`, `1m30s`, `1h`."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

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
