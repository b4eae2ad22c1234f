"""The drawings of a run's page: SVG charts, and strips of small pictures of its video."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from edit_ray.video.encode import Frames, read_frames

_LANE, _BAR, _CHART, _ROOM, _FOOT = 40, 18, 120, 16, 20
_LEFT = 5  # percent of the width before the first column of a chart or a heat map
_UNIT = 14  # height of a row of a heat map
_BROAD = 2.5  # percent of the width that a letter of a bar's label takes on a phone
_THIN = 0.8  # percent of the width: what is shorter is drawn 3 pixels wide, to be seen on a phone
_SHORTEST_S = 1e-6  # below it nothing is drawn to scale, as divisions would overflow
HEIGHT_PX, MOST_SEGMENTS = 96, 40  # of a strip's pictures

_Point = tuple[float, float, int, float]  # x in percent, y in pixels, position, value

# Everything is placed in percent of the width, so that a drawing fits a phone and its texts stay readable there.


@dataclass(frozen=True)
class Bar:
    """Work on a lane, in seconds from the start of the drawing; `label` is shown where it fits, `tooltip` on hover.

    `colour` is one of the stylesheet's: blue, green, orange, purple, red, grey.
    """

    lane: str
    start_s: float
    length_s: float
    colour: str
    label: str
    tooltip: str


@dataclass(frozen=True)
class Curve:
    """A line of a chart: its name, its colour in the stylesheet, and its values from 0 on, None where it has none."""

    name: str
    colour: str
    values: Sequence[float | None]
    dashed: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map, hollow where work was reused."""

    column: int
    row: int
    hollow: bool
    tooltip: str


def timeline(bars: Sequence[Bar], title: str) -> str:
    """Lanes from top to bottom in the order in which they first appear, time from left to right."""
    lanes = list(dict.fromkeys(bar.lane for bar in bars))
    end = max((bar.start_s + bar.length_s for bar in bars), default=0.0)
    end = end if end > _SHORTEST_S else 1.0
    scale, bottom = 100 / end, _LANE * len(lanes)
    step = nice_step(end)
    ticks = [(tick * step * scale, f"{tick * step:g} s") for tick in range(int(end / step) + 1)]
    parts = [_vertical(x, bottom, "grid") for x, _ in ticks]
    parts += [f'<text x="0" y="{_LANE * row + 12}">{html.escape(lane)}</text>' for row, lane in enumerate(lanes)]
    for bar in bars:
        x, y = bar.start_s * scale, _LANE * lanes.index(bar.lane) + _BAR
        width = bar.length_s * scale
        drawn = f'x="{x:.3f}%" width="{width:.3f}%"'
        if width < _THIN:
            drawn = f'x="{min(x, 100 - _THIN):.3f}%" width="3" stroke="none"'
        parts.append(
            f'<rect class="mark {bar.colour}" {drawn} y="{y}" height="{_BAR}">'
            f"<title>{html.escape(bar.tooltip)}</title></rect>"
        )
        if width > _BROAD * len(bar.label):
            label = html.escape(bar.label)
            parts.append(f'<text class="on" x="{x + width / 2:.3f}%" y="{y + 13}" text-anchor="middle">{label}</text>')
    return _svg(bottom + _FOOT, [*parts, *_axis(ticks, bottom + 14)], title)


def chart(lines: Sequence[Curve], unit: str, title: str, of: str = "segment", breaks: Collection[int] = ()) -> str:
    """Curves over the segments (or whatever `of` names) from 0 on; the scale begins at 0.

    At each of `breaks` something else begins: a vertical line stands before it, and no curve crosses that.
    """
    top = max((value for line in lines for value in line.values if value is not None), default=0.0) or 1.0
    count = max((len(line.values) for line in lines), default=0)
    width, bottom = (100 - _LEFT) / max(1, count), _CHART + _ROOM
    parts = [f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>' for y in (_ROOM, bottom)]
    parts += [_vertical(_LEFT + at * width, bottom, "change", "the prompt changes") for at in sorted(breaks)]
    curves, dots = [], []
    for line in lines:
        points = [
            (_LEFT + (at + 0.5) * width, bottom - _CHART * max(0.0, v) / top, at, v)
            for at, v in enumerate(line.values)
            if v is not None
        ]
        dash = " dashed" if line.dashed else ""
        for stretch in _stretches(points, breaks):
            path = " ".join(f"{10 * x:.1f},{y:.1f}" for x, y, _, _ in stretch)
            curves.append(f'<polyline class="curve {line.colour}{dash}" points="{path}"/>')
        name = html.escape(line.name)
        dots += [
            f'<circle class="mark {line.colour}" cx="{x:.2f}%" cy="{y:.1f}" r="4"><title>{name}, {of} {at}: {v:.3g} '
            f"{html.escape(unit)}</title></circle>"
            for x, y, at, v in points
            if count <= 60
        ]
    box = f'viewBox="0 0 1000 {bottom}" height="{bottom}" preserveAspectRatio="none"'
    parts += [f"<svg {box}>{''.join(curves)}</svg>", *dots]
    parts += [f'<text x="0" y="11">{top:.3g} {html.escape(unit)}</text><text x="0" y="{bottom - 3}">0</text>']
    return _svg(bottom + _FOOT, [*parts, *_axis(_numbers(count, max(1, round(count / 20))), bottom + 14)], title)


def heat_map(cells: Sequence[Cell], columns: int, rows: int, title: str) -> str:
    """Columns from left to right, numbered each fifth; rows from top to bottom."""
    width = (100 - _LEFT) / max(1, columns)
    parts = [
        f'<rect class="mark {"reuse" if cell.hollow else "blue"}" x="{_LEFT + cell.column * width:.3f}%" '
        f'y="{cell.row * _UNIT}" width="{width:.3f}%" height="{_UNIT}">'
        f"<title>{html.escape(cell.tooltip)}</title></rect>"
        for cell in cells
    ]
    return _svg(rows * _UNIT + _FOOT, [*parts, *_axis(_numbers(columns, 5), rows * _UNIT + 14)], title)


def _numbers(count: int, every: int) -> list[tuple[float, str]]:
    """The middle of each `every`th of `count` columns, with its number."""
    return [(_LEFT + (at + 0.5) * (100 - _LEFT) / count, f"{at}") for at in range(0, count, every)]


def _stretches(points: Sequence[_Point], breaks: Collection[int]) -> list[list[_Point]]:
    """The points between breaks; one that is empty if there are none."""
    parts: list[list[_Point]] = [[]]
    for before, point in zip([None, *points], points, strict=False):
        if before is not None and any(before[2] < at <= point[2] for at in breaks):
            parts.append([])
        parts[-1].append(point)
    return parts


def _vertical(x: float, bottom: float, kind: str, tooltip: str = "") -> str:
    title = f"<title>{html.escape(tooltip)}</title>" if tooltip else ""
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{bottom}">{title}</line>'


def _axis(ticks: Sequence[tuple[float, str]], y: int) -> list[str]:
    """The numbers below a drawing; a phone shows every second one."""
    return [
        f'<text class="{"minor" if index % 2 else "major"}" x="{x:.2f}%" y="{y}" '
        f'text-anchor="{"start" if x < 2 else "end" if x > 98 else "middle"}">{html.escape(label)}</text>'
        for index, (x, label) in enumerate(ticks)
    ]


def nice_step(length: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a positive length into 5 to 15 parts."""
    rough = length / 10
    power: float = 10.0 ** math.floor(math.log10(rough))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))


def _svg(height: int, parts: Sequence[str], title: str) -> str:
    return f'<svg role="img" aria-label="{html.escape(title)}" height="{height}">{"".join(parts)}</svg>'


def sampled(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def ends_of(part: Path, init: Path, *, height: int, width: int) -> list[str]:
    """The first and the last frame of a segment as data URLs. Raises EncodeError."""
    frames = read_frames(part, init=init, height=height, width=width)
    return [data_url(frames[index]) for index in (0, -1)]


def data_url(frame: Frames) -> str:
    """One frame [H, W, 3] as a small JPEG in a URL."""
    height, width, _ = frame.shape
    small = Image.fromarray(frame).resize((max(1, round(width * HEIGHT_PX / height)), HEIGHT_PX))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def strip(pictures: Sequence[tuple[int, Sequence[str]]], captions: Mapping[int, str]) -> str:
    """The pictures of segments as HTML: the last of one and the first of the next show a seam.

    `captions` (text) has what stands below a segment's pictures besides its number.
    """
    parts = []
    for segment, urls in pictures:
        images = "".join(f'<img src="{url}" alt="" height="{HEIGHT_PX}">' for url in urls)
        caption = html.escape(" ".join(filter(None, (f"{segment}", captions.get(segment)))))
        parts.append(f'<li>{images}<span class="caption">{caption}</span></li>')
    return f'<ol class="strip" tabindex="0" aria-label="First and last frame of each segment">{"".join(parts)}</ol>'
