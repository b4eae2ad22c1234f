"""What a run has done, as one HTML page without external resources: figures, prompts, seams, work, segments."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from edit_ray.cache.records import Record
from edit_ray.page import legend as keys
from edit_ray.page.decisions import decisions_of
from edit_ray.page.document import document, figures, folded, note, word
from edit_ray.page.drawing import Bar, Curve, chart, sampled, strip, timeline
from edit_ray.page.legend import AGAIN, CHANNELS, INSIDE, TIERS, WORK, legend
from edit_ray.page.run_summary import DRIFT, SCORE, SEAM, PromptSpan, headline, skip_rate, spans_of, values_of
from edit_ray.runs.manifest import SegmentRecord

MOST_RECORDS = 40

_VALUES = {
    "denoising": ("denoise_s", "{:.2f} s"),
    "decoding": ("decode_s", "{:.2f} s"),
    "encoding": ("encode_s", "{:.2f} s"),
    "seam: score": ("seam_score", "{:.2f}"),
    "seam: jump of motion": ("seam_jump", "× {:.2f}"),
    "seam: turn of motion": ("seam_accel", "× {:.2f}"),
    "seam: step of colour": ("seam_color", "{:.1f} of 255"),
    "seam: sharpness, log2": ("seam_sharp", "{:+.2f}"),
    "entries read": ("entries_read", "{:.0f}"),
    "entries written": ("entries_written", "{:.0f}"),
    "chunks": ("chunks", "{:.0f}"),
    "K/V made again in": ("recache_s", "{:.2f} s"),
    "K/V on the device": ("kv_bytes", "{:,.0f} bytes"),
}


def render_run(
    run_id: str,
    state: str,
    settings: str,
    segments: Sequence[SegmentRecord],
    *,
    num_segments: int | None = None,
    fps: float = 16.0,
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
        num_segments: as many as it is to have; None if it is endless.
        fps: frames per second of the video.
        records: what the cache decided, by `heading_of` each segment.
        pictures: data URLs of frames, with the index of their segment.
        events: the lines of the run's event log.
    """
    spans = spans_of(segments)
    work, seams, tiers = _work(segments, events), _seams(segments, spans), _tiers(segments)
    groups = [
        *([keys.CHANGES] if seams or work else []),
        *([keys.SEAMS, keys.COLOURS] if seams else []),
        *([keys.STORED] if tiers else []),
        *([keys.CACHE, keys.COMPARED] if records else []),
    ]
    parts = [
        figures(headline(segments, num_segments, fps, events)),
        _frames(pictures, spans),
        _prompts(spans, fps),
        f"<h2>Legend</h2>{legend(groups)}" if groups else "",
        *(seams, work, tiers),
        _segments(segments, spans, records, fps),
        f"<h2>Settings</h2>{folded('run.yaml', f'<pre>{html.escape(settings)}</pre>')}",
    ]
    return document(f"Run {run_id}", parts, state)


def heading_of(index: int, take: int) -> str:
    """The heading of a segment's record of decisions."""
    return f"segment {index}" + (f", take {take}" if take else "")


def bars_of(segments: Sequence[SegmentRecord], events: Sequence[Mapping[str, Any]] = ()) -> list[Bar]:
    """The work of all actors on these segments, in seconds after its beginning; events have no length."""
    found = [
        (segment.index, work, segment.statistics[f"{work}_at"], segment.statistics[f"{work}_s"])
        for work in WORK
        for segment in segments
        if {f"{work}_at", f"{work}_s"} <= segment.statistics.keys()
    ]
    zero = min((begin for _, _, begin, _ in found), default=0.0)
    bars = []
    for index, work, begin, length in found:
        lane, colour = WORK[work]
        bars.append(Bar(lane, begin - zero, length, colour, f"{index}", f"segment {index}: {work} {length:.2f} s"))
    return bars + [mark for event in events if found and (mark := _mark(event, zero)) is not None]


def _mark(event: Mapping[str, Any], zero: float) -> Bar | None:
    """The mark of an event that shows: a segment was requested in advance, or started again."""
    segment, attempt, wall = event.get("segment"), event.get("attempt"), event.get("wall")
    if not isinstance(wall, int | float) or wall < zero:
        return None
    if event.get("event") == "prepare_asked":
        lane, colour = WORK["complete"]
        return Bar(lane, wall - zero, 0, colour, "", f"segment {segment} is asked for")
    if event.get("event") == "segment_begun" and isinstance(attempt, int) and attempt > 0:
        lane, _ = WORK["denoise"]
        return Bar(lane, wall - zero, 0, AGAIN, "", f"segment {segment}: begun again, attempt {attempt + 1}")
    return None


def _frames(pictures: Sequence[tuple[int, Sequence[str]]], spans: Sequence[PromptSpan]) -> str:
    scores = {
        s.index: f"· seam {s.statistics['seam_score']:.2f}"
        for span in spans
        for s in span.segments
        if "seam_score" in s.statistics
    } | {span.segments[0].index: "· new prompt" for span in spans[1:]}
    about = note("The first and the last frame of each segment; a seam lies between two segments.")
    return f"<h2>Film strip</h2>{about}{strip(pictures, scores)}" if pictures else ""


def _prompts(spans: Sequence[PromptSpan], fps: float) -> str:
    shown = []
    for span in spans:
        first, last = span.segments[0], span.segments[-1]
        end = (last.first_frame + last.num_frames) / fps
        notes = []
        if span.change is not None:
            notes.append(f"New prompt: {span.change}.")
        if span.drift is not None:
            notes.append(f"Drift: {span.drift}.")
        of = f"Segment {first.index}" if first is last else f"Segments {first.index}–{last.index}"
        shown.append(
            f'<li class="panel"><h3>{of}, {first.first_frame / fps:.1f}–{end:.1f} s</h3>'
            f'<p class="prompt">{html.escape(first.prompt)}</p>{"".join(map(note, notes))}</li>'
        )
    return f'<h2>Prompts</h2><ol class="scenes">{"".join(shown)}</ol>'


def _work(segments: Sequence[SegmentRecord], events: Sequence[Mapping[str, Any]]) -> str:
    bars = bars_of(segments, events)
    return f"<h2>Who worked when</h2>{timeline(bars, 'who worked when, in seconds')}" if bars else ""


def _seams(segments: Sequence[SegmentRecord], spans: Sequence[PromptSpan]) -> str:
    breaks = {span.segments[0].index for span in spans[1:]}
    parts = []
    scores, inside = values_of(segments, "seam_score"), values_of(segments, "interior_score")
    if any(score is not None for score in scores):
        lines = [Curve("at the seam", "blue", scores)]
        if any(score is not None for score in inside):
            lines.append(Curve(*INSIDE, inside, dashed=True))
        about = f"The {word('score', SCORE)} of the {word('seam', SEAM)} before each segment; high is as it should be "
        drawn = chart(lines, "", "seam score by segment", breaks=breaks)
        parts.append(f"<h3>Seams</h3>{note(about + 'where the prompt changes.')}{drawn}")
    colours = [Curve(name, colour, values_of(segments, name)) for name, colour in CHANNELS.items()]
    if sum(value is not None for value in colours[0].values) > 1:
        about = f"What changes between two changes of the prompt is {word('drift', DRIFT)}."
        drawn = chart(colours, "of 255", "mean colour by segment", breaks=breaks)
        parts.append(f"<h3>Colour</h3>{note(about)}{drawn}")
    return f"<h2>Seams and drift</h2>{''.join(parts)}" if parts else ""


def _tiers(segments: Sequence[SegmentRecord]) -> str:
    lines = [Curve(name, colour, values_of(segments, f"{tier}_bytes", 2**20)) for tier, (name, colour) in TIERS.items()]
    if all(value is None for line in lines for value in line.values):
        return ""
    counts = ", ".join(
        f"{name.removeprefix('prefetch_')} {value:.0f}"
        for name, value in segments[-1].statistics.items()
        if name.startswith("prefetch_")
    )
    read, written = (sum(s.statistics.get(f"entries_{what}", 0) for s in segments) for what in ("read", "written"))
    of_kv = any("chunks" in segment.statistics for segment in segments)
    said = ("entries of K/V", "keys and values of a chunk in a layer, with which a later segment begins")
    residuals = word(*(said if of_kv else ("residuals", "results of the model that a later segment can reuse")))
    prefetch = word("Prefetch", "reading from disk before the model asks for it")
    about = f"{written:.0f} {residuals} written, {read:.0f} read. {prefetch}: {html.escape(counts)}."
    return f"<h2>Stored for reuse</h2>{note(about)}{chart(lines, 'MiB', 'MiB stored, by segment')}"


def _segments(
    segments: Sequence[SegmentRecord], spans: Sequence[PromptSpan], records: Mapping[str, Record], fps: float
) -> str:
    names = list(records)
    shown = {names[index]: records[names[index]] for index in sampled(len(names), MOST_RECORDS)}
    begins = {span.segments[0].index for span in spans[1:]}
    folds = [_segment(s, s.index in begins, shown.pop(heading_of(s.index, s.take), None), fps) for s in segments]
    folds += [folded(f"<b>{html.escape(name)}</b>", decisions_of(record)) for name, record in shown.items()]
    of = f"What the cache decided of {MOST_RECORDS} of {len(records)} segments is inside them. "
    about = note((of if len(records) > MOST_RECORDS else "") + "Press one to open it.")
    return f"<h2>Segments</h2>{about}{''.join(folds)}"


def _segment(segment: SegmentRecord, new_prompt: bool, record: Record | None, fps: float) -> str:
    """A segment in one line, with everything about it inside."""
    known = segment.statistics
    values = {name: form.format(known[key]) for name, (key, form) in _VALUES.items() if key in known}
    rate = skip_rate([segment])
    begin, end = (frame / fps for frame in (segment.first_frame, segment.first_frame + segment.num_frames))
    line = [f"<b>Segment {segment.index}</b>", f"<span>{begin:.1f}–{end:.1f} s</span>"]
    if "seam_score" in known:
        line.append(f"<span>seam {known['seam_score']:.2f}</span>")
    if rate is not None:
        line.append(f"<span>reused {rate:.0%}</span>")
    if "denoise_s" in known:
        line.append(f"<span>denoised in {known['denoise_s']:.1f} s</span>")
    if new_prompt:
        line.append('<span class="badge">new prompt</span>')
    about = {"frames": f"{segment.num_frames}", "seed": f"{segment.seed}", "take": f"{segment.take}", **values}
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in about.items())
    inside = f'<p class="prompt">{html.escape(segment.prompt)}</p><dl class="values">{cells}</dl>'
    if record is not None:
        inside += f"<h3>What the cache decided</h3>{decisions_of(record)}"
    return folded(" ".join(line), inside)
