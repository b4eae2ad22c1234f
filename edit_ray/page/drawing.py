"""The drawings of a run's page: SVG charts, and strips of small pictures of its video."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from edit_ray.video.encode import Frames, read_frames

WIDTH = 900
_LEFT, _LANE, _CHART, _FOOT = 150, 26, 120, 20
_SHORTEST_S = 1e-6  # below it nothing is drawn to scale, as divisions would overflow
HEIGHT_PX, MOST_SEGMENTS = 96, 40  # of a strip's pictures


@dataclass(frozen=True)
class Bar:
    """Work on a lane, in seconds from the start of the drawing; `label` is shown where it fits, `tooltip` on hover."""

    lane: str
    start_s: float
    length_s: float
    colour: str
    label: str
    tooltip: str


def timeline(bars: Sequence[Bar]) -> str:
    """Lanes from top to bottom in the order in which they first appear, time from left to right."""
    lanes = list(dict.fromkeys(bar.lane for bar in bars))
    end = max((bar.start_s + bar.length_s for bar in bars), default=0.0)
    end = end if end > _SHORTEST_S else 1.0
    scale, bottom = (WIDTH - _LEFT) / end, _LANE * len(lanes)
    parts = [f'<text x="0" y="{_LANE * row + 17}">{html.escape(lane)}</text>' for row, lane in enumerate(lanes)]
    for bar in bars:
        x, y = _LEFT + bar.start_s * scale, _LANE * lanes.index(bar.lane) + 3
        width = max(1.0, bar.length_s * scale - 1)  # a gap of 1 separates neighbours
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_LANE - 6}" '
            f'fill="{bar.colour}"><title>{html.escape(bar.tooltip)}</title></rect>'
        )
        if width > 10 * len(bar.label):
            parts.append(f'<text x="{x + 4:.2f}" y="{y + 14}" style="fill:#fff">{html.escape(bar.label)}</text>')
    step = nice_step(end)
    for tick in range(int(end / step) + 1):
        x = _LEFT + tick * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" stroke="#a0aec0" stroke-width=".5"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}">{tick * step:g} s</text>')
    return _svg(bottom + _FOOT, parts)


def chart(lines: Mapping[str, Sequence[float | None]], colours: Sequence[str], unit: str) -> str:
    """One line per name over the segments from 0 on, None where a segment has no value; the scale begins at 0."""
    values = [value for line in lines.values() for value in line if value is not None]
    top = max(values, default=0.0) or 1.0
    count = max(map(len, lines.values()), default=0)
    step = (WIDTH - _LEFT - 20) / max(1, count - 1)
    parts = [f'<text x="0" y="14">{top:.3g} {html.escape(unit)}</text><text x="0" y="{_CHART}">0</text>']
    for index, (name, line) in enumerate(lines.items()):
        colour = colours[index % len(colours)]
        points = [
            (_LEFT + at * step, _CHART * (1 - max(0.0, v) / top) + 4) for at, v in enumerate(line) if v is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points if count <= 60]
        parts.append(f'<text x="0" y="{34 + 15 * index}" style="fill:{colour}">{html.escape(name)}</text>')
    every = max(1, round(count / 20))
    parts += [f'<text x="{_LEFT + at * step:.1f}" y="{_CHART + 18}">{at}</text>' for at in range(0, count, every)]
    return _svg(_CHART + _FOOT, parts)


def nice_step(length: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides a positive length into 5 to 15 parts."""
    rough = length / 10
    power: float = 10.0 ** math.floor(math.log10(rough))
    return min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">{"".join(parts)}</svg>'


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


def strip(pictures: Sequence[tuple[int, Sequence[str]]]) -> str:
    """The pictures of segments as HTML: the last of one and the first of the next show a join."""
    parts = []
    for segment, urls in pictures:
        images = "".join(f'<img src="{url}" alt="" height="{HEIGHT_PX}">' for url in urls)
        parts.append(f"<figure>{images}<figcaption>{segment}</figcaption></figure>")
    return f'<div class="strip">{"".join(parts)}</div>'
