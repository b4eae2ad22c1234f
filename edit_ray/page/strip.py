"""A strip of small pictures of a video, inside the page that shows them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from edit_ray.video.encode import Frames, read_frames

HEIGHT_PX = 96
MOST_SEGMENTS = 40


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
    """The pictures of segments, as HTML: two that touch are the frames of a join."""
    parts = []
    for segment, urls in pictures:
        images = "".join(f'<img src="{url}" alt="" height="{HEIGHT_PX}">' for url in urls)
        parts.append(f"<figure>{images}<figcaption>{segment}</figcaption></figure>")
    return f'<div class="strip">{"".join(parts)}</div>'
