"""What a run has done, as one HTML page without external resources: its timeline, reuse, frames and joins."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from edit_ray.cache.records import STYLE, Record, decision_sections
from edit_ray.page.drawing import Bar, chart, sampled, strip, timeline
from edit_ray.runs.manifest import SegmentRecord
from edit_ray.video.seams import Appearance

MOST_RECORDS = 40

# A segment's statistics give each kind of work as `<work>_at` (Unix seconds) and `<work>_s`: its lane and its colour.
_WORK = {
    "denoise": ("GPU actor, denoising", "#2b6cb0"),
    "decode": ("GPU actor, decoding", "#2f855a"),
    "encode": ("encoder process", "#dd6b20"),
    "complete": ("CacheStore actor", "#805ad5"),
    "publish": ("segment scheduler", "#c53030"),
}
_RETRY = "#c53030"
_LINES = ("#2b6cb0", "#a0aec0", "#dd6b20")
_CHANNELS = {"red": "#c53030", "green": "#2f855a", "blue": "#2b6cb0"}
_COLUMNS = {
    "denoise": ("denoise_s", "{:.2f} s"),
    "decode": ("decode_s", "{:.2f} s"),
    "encode": ("encode_s", "{:.2f} s"),
    "skipped": ("skipped", "{:.0%}"),
    "seam": ("seam_score", "{:.2f}"),
    "jump": ("seam_jump", "{:.2f}"),
    "accel": ("seam_accel", "{:.2f}"),
    "color": ("seam_color", "{:.1f}"),
    "sharp": ("seam_sharp", "{:+.2f}"),
}
_STYLE = (
    STYLE
    + """
.strip { display: flex; flex-wrap: wrap; gap: 2px; } figure { margin: 0 0 .6rem; } figcaption { font-size: 11px; }
pre { overflow: auto; background: #f7fafc; padding: .6rem; } .wide { overflow-x: auto; }
.wide :is(td, th):last-child { text-align: left; min-width: 12rem; } table { font-size: 13px; }
"""
)


def render_run(
    run_id: str,
    state: str,
    settings: str,
    segments: Sequence[SegmentRecord],
    *,
    records: Mapping[str, Record],
    pictures: Sequence[tuple[int, Sequence[str]]] = (),
    events: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page of a run; all of the user's texts are escaped.

    Args:
        run_id: the run.
        state: its state.
        settings: its run.yaml.
        segments: those that are committed.
        records: what the cache decided, by the heading of each record.
        pictures: data URLs of frames, with the index of their segment.
        events: the lines of the run's event log.
    """
    frames = sum(segment.num_frames for segment in segments)
    title = html.escape(f"Run {run_id}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<h1>{title}</h1><p>{html.escape(state)}, {len(segments)} segments, {frames} frames</p>",
        strip(pictures) if pictures else "",
        f"<h2>Who worked when</h2>{timeline(bars)}" if (bars := bars_of(segments, events)) else "",
        _seams(segments),
        _tiers(segments),
        _table(segments),
        _decisions(records),
        f"<h2>Settings</h2><details><summary>run.yaml</summary><pre>{html.escape(settings)}</pre></details>",
    ]
    return "".join(parts) + "</html>\n"


def bars_of(segments: Sequence[SegmentRecord], events: Sequence[Mapping[str, Any]] = ()) -> list[Bar]:
    """The work of all actors on these segments, in seconds after its beginning; events have no length."""
    found = [
        (segment.index, work, segment.statistics[f"{work}_at"], segment.statistics[f"{work}_s"])
        for work in _WORK
        for segment in segments
        if {f"{work}_at", f"{work}_s"} <= segment.statistics.keys()
    ]
    zero = min((begin for _, _, begin, _ in found), default=0.0)
    bars = []
    for index, work, begin, length in found:
        lane, colour = _WORK[work]
        bars.append(Bar(lane, begin - zero, length, colour, f"{index}", f"segment {index}: {work} {length:.2f} s"))
    return bars + [mark for event in events if found and (mark := _mark(event, zero)) is not None]


def _mark(event: Mapping[str, Any], zero: float) -> Bar | None:
    """The mark of an event that shows: a segment was requested in advance, or started again."""
    segment, attempt, wall = event.get("segment"), event.get("attempt"), event.get("wall")
    if not isinstance(wall, int | float) or wall < zero:
        return None
    if event.get("event") == "prepare_asked":
        lane, colour = _WORK["complete"]
        return Bar(lane, wall - zero, 0, colour, "", f"segment {segment} is asked for")
    if event.get("event") == "segment_begun" and isinstance(attempt, int) and attempt > 0:
        lane, _ = _WORK["denoise"]
        return Bar(lane, wall - zero, 0, _RETRY, "", f"segment {segment}: begun again, attempt {attempt + 1}")
    return None


def _values(segments: Sequence[SegmentRecord], name: str, unit: float = 1) -> list[float | None]:
    """One statistic of every segment, in units; None where a segment has none."""
    return [None if (value := segment.statistics.get(name)) is None else value / unit for segment in segments]


def _seams(segments: Sequence[SegmentRecord]) -> str:
    scores = _values(segments, "seam_score")
    parts = []
    if any(score is not None for score in scores):
        lines = {"the join before it": scores, "places inside it": _values(segments, "interior_score")}
        lines = {name: line for name, line in lines.items() if any(value is not None for value in line)}
        parts.append(f"<p>Seam score of each segment; 0 is seamless.</p>{chart(lines, _LINES, '')}")
    names = (*_CHANNELS, "sharpness")
    known = [
        Appearance(*(segment.statistics[name] for name in names))
        for segment in segments
        if all(name in segment.statistics for name in names)
    ]
    if len(known) > 1:
        color, sharp = known[0].drift(known[-1])
        parts.append(
            f"<p>From the first segment to the last, colour drifts by {color:.1f} of 255 grey levels, and sharpness by "
            f"a factor of {2**sharp:.2f}.</p>"
        )
        parts.append(chart({name: _values(segments, name) for name in _CHANNELS}, [*_CHANNELS.values()], "of 255"))
    return f"<h2>Joins and drift</h2>{''.join(parts)}" if parts else ""


def _tiers(segments: Sequence[SegmentRecord]) -> str:
    lines = {tier: _values(segments, f"{tier}_bytes", 2**20) for tier in ("host", "disk")}
    if all(value is None for line in lines.values() for value in line):
        return ""
    counts = ", ".join(
        f"{name.removeprefix('prefetch_')} {value:.0f}"
        for name, value in segments[-1].statistics.items()
        if name.startswith("prefetch_")
    )
    read, written = (sum(s.statistics.get(f"entries_{what}", 0) for s in segments) for what in ("read", "written"))
    return (
        f"<h2>Tiers</h2><p>{written:.0f} residuals written, {read:.0f} read. Prefetch: {html.escape(counts)}.</p>"
        f"{chart(lines, _LINES, 'MiB')}"
    )


def _table(segments: Sequence[SegmentRecord]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("segment", "frames", "seed", *_COLUMNS, "prompt"))
    rows = []
    for segment in segments:
        values = dict(segment.statistics)
        computed, skipped = (values.get(f"units_{what}", 0) for what in ("computed", "skipped"))
        if computed + skipped:
            values["skipped"] = skipped / (computed + skipped)
        cells = [f"{segment.index}", f"{segment.num_frames}", f"{segment.seed}"]
        cells += [form.format(values[name]) if name in values else "" for name, form in _COLUMNS.values()]
        rows.append("".join(f"<td>{cell}</td>" for cell in (*cells, html.escape(segment.prompt))))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<h2>Segments</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _decisions(records: Mapping[str, Record]) -> str:
    if not records:
        return ""
    names = list(records)
    shown = {names[index]: records[names[index]] for index in sampled(len(names), MOST_RECORDS)}
    of = "" if len(shown) == len(records) else f" of {len(shown)} of {len(records)} segments"
    return f"<h2>What the cache decided{of}</h2>{decision_sections(shown)}"
