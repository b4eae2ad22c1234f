"""What a run has done, as one HTML page that needs nothing else: when, what was reused, how it looks."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edit_ray.cache.record_page import STYLE, decision_sections
from edit_ray.cache.records import Record
from edit_ray.page.drawing import Bar, chart, sampled, strip, timeline
from edit_ray.video.seams import Appearance

MOST_RECORDS = 40

# What a segment's statistics name `<work>_at` (unix seconds) and `<work>_s`, who does it, and its colour.
_WORK = {
    "denoise": ("GPU actor, denoising", "#2b6cb0"),
    "decode": ("GPU actor, decoding", "#2f855a"),
    "encode": ("encoder process", "#dd6b20"),
    "complete": ("CacheStore actor", "#805ad5"),
    "publish": ("segment scheduler", "#c53030"),
}
_AGAIN = "#c53030"
_LINES = ("#2b6cb0", "#a0aec0", "#dd6b20")
_STYLE = (
    STYLE
    + """
.strip { display: flex; flex-wrap: wrap; gap: 2px; } figure { margin: 0 0 .6rem; } figcaption { font-size: 11px; }
pre { overflow: auto; background: #f7fafc; padding: .6rem; } .wide { overflow-x: auto; }
.wide :is(td, th):last-child { text-align: left; min-width: 12rem; } table { font-size: 13px; }
"""
)


@dataclass(frozen=True)
class ReportedSegment:
    """One committed segment of the report, with its figures as the manifest has them."""

    index: int
    prompt: str
    seed: int
    num_frames: int
    statistics: Mapping[str, float]


@dataclass(frozen=True)
class RunReport:
    """All that the page shows. `pictures` are URLs of frames by segment, `events` lines of the run's event log."""

    run_id: str
    state: str
    settings: str
    segments: Sequence[ReportedSegment]
    records: Mapping[str, Record] = field(default_factory=dict)
    pictures: Sequence[tuple[int, Sequence[str]]] = ()
    events: Sequence[Mapping[str, Any]] = ()


def render_run(report: RunReport) -> str:
    """The page; every text of the user's is shown as text."""
    segments = report.segments
    frames = sum(segment.num_frames for segment in segments)
    title = html.escape(f"Run {report.run_id}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<h1>{title}</h1><p>{html.escape(report.state)}, {len(segments)} segments, {frames} frames</p>",
        strip(report.pictures) if report.pictures else "",
        _timeline(segments, report.events),
        _seams(segments),
        _tiers(segments),
        _table(segments),
        _decisions(report.records),
        f"<h2>Settings</h2><details><summary>run.yaml</summary><pre>{html.escape(report.settings)}</pre></details>",
    ]
    return "".join(parts) + "</html>\n"


def bars_of(segments: Sequence[ReportedSegment], events: Sequence[Mapping[str, Any]] = ()) -> list[Bar]:
    """The work of all actors for these segments, from the first beginning on; events among it have no length."""
    found = [
        (segment, work, segment.statistics[f"{work}_at"], segment.statistics[f"{work}_s"])
        for work in _WORK
        for segment in segments
        if {f"{work}_at", f"{work}_s"} <= segment.statistics.keys()
    ]
    zero = min((begin for _, _, begin, _ in found), default=0.0)
    return [
        Bar(*_bar(work, begin - zero, length), f"{segment.index}", f"segment {segment.index}: {work} {length:.2f} s")
        for segment, work, begin, length in found
    ] + [mark for event in events if found and (mark := _mark(event, zero)) is not None]


def _mark(event: Mapping[str, Any], zero: float) -> Bar | None:
    """What is told of an event: that a segment was asked for ahead of its turn, or begun once more."""
    segment, attempt, wall = event.get("segment"), event.get("attempt"), event.get("wall")
    if not isinstance(wall, int | float) or wall < zero:
        return None
    if event.get("event") == "prepare_asked":
        return Bar(*_bar("complete", wall - zero, 0), "", f"segment {segment} is asked for")
    if event.get("event") == "segment_begun" and isinstance(attempt, int) and attempt > 0:
        lane = _WORK["denoise"][0]
        return Bar(lane, wall - zero, 0, _AGAIN, "", f"segment {segment}: begun again, attempt {attempt + 1}")
    return None


def _bar(work: str, start_s: float, length_s: float) -> tuple[str, float, float, str]:
    lane, colour = _WORK[work]
    return lane, start_s, length_s, colour


def _timeline(segments: Sequence[ReportedSegment], events: Sequence[Mapping[str, Any]]) -> str:
    bars = bars_of(segments, events)
    return f"<h2>Who worked when</h2>{timeline(bars)}" if bars else ""


def _seams(segments: Sequence[ReportedSegment]) -> str:
    scores = [segment.statistics.get("seam_score") for segment in segments]
    looks = [_look(segment) for segment in segments]
    known = [look for look in looks if look is not None]
    parts = []
    if any(score is not None for score in scores):
        inside = [segment.statistics.get("interior_score") for segment in segments]
        lines: dict[str, Sequence[float | None]] = {"the join before it": scores}
        if any(score is not None for score in inside):
            lines["places inside it"] = inside
        parts.append(f"<p>Seam score of each segment; 0 is seamless.</p>{chart(lines, _LINES, '')}")
    if len(known) > 1:
        color, sharp = known[0].drift(known[-1])
        parts.append(
            f"<p>From the first segment to the last, colour drifts by {color:.1f} of 255 grey levels, and sharpness by "
            f"a factor of {2**sharp:.2f}.</p>"
        )
        channels = {name: [None if look is None else getattr(look, name) for look in looks] for name in _CHANNELS}
        parts.append(chart(channels, ("#c53030", "#2f855a", "#2b6cb0"), "of 255"))
    return f"<h2>Joins and drift</h2>{''.join(parts)}" if parts else ""


_CHANNELS = ("red", "green", "blue")


def _look(segment: ReportedSegment) -> Appearance | None:
    figures = segment.statistics
    names = (*_CHANNELS, "sharpness")
    return Appearance(*(figures[name] for name in names)) if all(name in figures for name in names) else None


def _tiers(segments: Sequence[ReportedSegment]) -> str:
    names = {"host_bytes": "host", "disk_bytes": "disk"}
    if not any(name in segment.statistics for segment in segments for name in names):
        return ""
    lines = {
        tier: [None if (b := segment.statistics.get(name)) is None else b / 2**20 for segment in segments]
        for name, tier in names.items()
    }
    last = segments[-1].statistics
    counts = ", ".join(
        f"{name.removeprefix('prefetch_')} {value:.0f}" for name, value in last.items() if name.startswith("prefetch_")
    )
    read, written = (sum(s.statistics.get(f"entries_{what}", 0) for s in segments) for what in ("read", "written"))
    return (
        f"<h2>Tiers</h2><p>{written:.0f} residuals written, {read:.0f} read. Prefetch: {html.escape(counts)}.</p>"
        f"{chart(lines, _LINES, 'MiB')}"
    )


_COLUMNS: dict[str, Callable[[ReportedSegment], str]] = {
    "frames": lambda s: str(s.num_frames),
    "seed": lambda s: str(s.seed),
    "denoise": lambda s: _figure(s, "denoise_s", "{:.2f} s"),
    "decode": lambda s: _figure(s, "decode_s", "{:.2f} s"),
    "encode": lambda s: _figure(s, "encode_s", "{:.2f} s"),
    "skipped": lambda s: _skipped(s),
    "seam": lambda s: _figure(s, "seam_score", "{:.2f}"),
    "jump": lambda s: _figure(s, "seam_jump", "{:.2f}"),
    "accel": lambda s: _figure(s, "seam_accel", "{:.2f}"),
    "color": lambda s: _figure(s, "seam_color", "{:.1f}"),
    "sharp": lambda s: _figure(s, "seam_sharp", "{:+.2f}"),
}


def _table(segments: Sequence[ReportedSegment]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("segment", *_COLUMNS, "prompt"))
    rows = "".join(
        f"<tr><td>{segment.index}</td>{''.join(f'<td>{cell(segment)}</td>' for cell in _COLUMNS.values())}"
        f"<td>{html.escape(segment.prompt)}</td></tr>"
        for segment in segments
    )
    return f'<h2>Segments</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _figure(segment: ReportedSegment, name: str, form: str) -> str:
    value = segment.statistics.get(name)
    return "" if value is None else form.format(value)


def _skipped(segment: ReportedSegment) -> str:
    computed, skipped = (segment.statistics.get(f"units_{what}", 0) for what in ("computed", "skipped"))
    return f"{skipped / (computed + skipped):.0%}" if computed + skipped else ""


def _decisions(records: Mapping[str, Record]) -> str:
    if not records:
        return ""
    names = list(records)
    shown = {names[index]: records[names[index]] for index in sampled(len(names), MOST_RECORDS)}
    of = "" if len(shown) == len(records) else f" of {len(shown)} of {len(records)} segments"
    return f"<h2>What the cache decided{of}</h2>{decision_sections(shown)}"
