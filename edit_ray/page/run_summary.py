"""What a run's segments say together: drift within a prompt, and the numbers at the head of its report."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edit_ray.page.document import Figure, word
from edit_ray.page.legend import WORK
from edit_ray.runs.manifest import SegmentRecord
from edit_ray.video.seams import Appearance

SEAM = "the place where one segment ends and the next begins"
SCORE = "how visible a seam is: 0 is invisible; 1 is twice the usual motion, or a step of 4 of 255 grey levels"
DRIFT = "a slow change of colour or sharpness that no prompt asked for"
REUSE = "results of the model that the cache took from an earlier step or segment, and that were not computed again"

_APPEARANCE = ("red", "green", "blue", "sharpness")


@dataclass(frozen=True)
class Change:
    """A difference in looks: grey levels of 255 of the colour that changed most, and a factor of sharpness."""

    color: float
    sharpness: float

    def __str__(self) -> str:
        return f"colour by {self.color:.1f} of 255 grey levels, sharpness by a factor of {self.sharpness:.2f}"


@dataclass(frozen=True)
class PromptSpan:
    """Consecutive segments of one prompt. `drift` is from the first to the last, `change` from the one before.

    Either is None where it is not known, or where there is nothing to compare.
    """

    segments: Sequence[SegmentRecord]
    drift: Change | None
    change: Change | None


def spans_of(segments: Sequence[SegmentRecord]) -> list[PromptSpan]:
    """The spans of a video, in order."""
    spans: list[PromptSpan] = []
    for _, group in itertools.groupby(segments, key=lambda segment: segment.prompt):
        of = list(group)
        before = spans[-1].segments[-1] if spans else None
        drift = _change(of[0], of[-1]) if len(of) > 1 else None
        spans.append(PromptSpan(of, drift, None if before is None else _change(before, of[0])))
    return spans


def _change(one: SegmentRecord, other: SegmentRecord) -> Change | None:
    looks = [_appearance(segment) for segment in (one, other)]
    if looks[0] is None or looks[1] is None:
        return None
    color, sharpness = looks[0].drift(looks[1])
    return Change(color, 2.0**sharpness)


def _appearance(segment: SegmentRecord) -> Appearance | None:
    values = [segment.statistics.get(name) for name in _APPEARANCE]
    known = [value for value in values if value is not None]
    return Appearance(*known) if len(known) == len(values) else None


def skip_rate(segments: Sequence[SegmentRecord]) -> float | None:
    """The share of the units that were reused; None if none was counted."""
    computed, skipped = (
        sum(s.statistics.get(f"units_{what}", 0) for s in segments) for what in ("computed", "skipped")
    )
    return skipped / (computed + skipped) if computed + skipped else None


def values_of(segments: Sequence[SegmentRecord], name: str, unit: float = 1) -> list[float | None]:
    """One statistic of every segment, in units; None where a segment has none."""
    return [None if (value := segment.statistics.get(name)) is None else value / unit for segment in segments]


def duration(seconds: float) -> str:
    """Such as `4.6 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def headline(
    segments: Sequence[SegmentRecord], num_segments: int | None, fps: float, events: Sequence[Mapping[str, Any]] = ()
) -> list[Figure]:
    """The numbers that say how a run went; those that are not known are left out."""
    frames = sum(segment.num_frames for segment in segments)
    of = "" if num_segments in (None, len(segments)) else f" of {num_segments}"
    shown = [Figure("Video", duration(frames / fps), f"{frames} frames, {len(segments)}{of} segments")]
    if (spent := _spent(segments)) is not None:
        each = duration(spent * fps / max(1, frames))
        shown.append(Figure("Made in", duration(spent), f"{each} for a second of video"))
    if (rate := skip_rate(segments)) is not None:
        shown.append(Figure(word("Reused", REUSE), f"{rate:.0%}", "of the model's work came from the cache"))
    shown += _seam_figure(segments) + _drift_figure(spans_of(segments))
    again = sum(event.get("event") == "segment_begun" and (event.get("attempt") or 0) > 0 for event in events)
    if again:
        shown.append(Figure("Begun again", f"{again}", "times, after a failure; no frame differs"))
    return shown


def _spent(segments: Sequence[SegmentRecord]) -> float | None:
    """Seconds from the first step to the last file."""
    done = [
        (segment.statistics[f"{work}_at"], segment.statistics[f"{work}_s"])
        for segment in segments
        for work in WORK
        if {f"{work}_at", f"{work}_s"} <= segment.statistics.keys()
    ]
    return max(begin + length for begin, length in done) - min(begin for begin, _ in done) if done else None


def _seam_figure(segments: Sequence[SegmentRecord]) -> list[Figure]:
    """The median of the seams within a prompt: where the prompt changes, the picture should change."""
    scores = [
        segment.statistics["seam_score"]
        for span in spans_of(segments)
        for segment in span.segments[1:]
        if "seam_score" in segment.statistics
    ]
    if not scores:
        return []
    inside = [value for value in values_of(segments, "interior_score") if value is not None]
    usual = f", inside segments {statistics.median(inside):.2f}" if inside else ""
    note = f"0 is invisible; worst {max(scores):.2f}{usual}"
    return [Figure(word("Seams", f"{SEAM}; its score says {SCORE}"), f"{statistics.median(scores):.2f}", note)]


def _drift_figure(spans: Sequence[PromptSpan]) -> list[Figure]:
    drifts = [span.drift for span in spans if span.drift is not None]
    if not drifts:
        return []
    most = max(drifts, key=lambda drift: drift.color)
    note = f"grey levels at most within one prompt; sharpness × {most.sharpness:.2f}"
    return [Figure(word("Drift", DRIFT), f"{most.color:.1f} of 255", note)]
