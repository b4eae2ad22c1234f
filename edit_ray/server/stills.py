"""Still pictures of a run: a segment's first frame, and a sheet of such frames over the whole video."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import BoundedSemaphore

from PIL import Image

from edit_ray.errors import SegmentGone
from edit_ray.page.drawing import sampled
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest, SegmentRecord
from edit_ray.server.refusals import refuse
from edit_ray.video.encode import EncodeError, ffmpeg

STILL_PIXELS, SHEET_PIXELS = 512, 160  # the longer side of a thumbnail, and of a frame in a sheet
MOST_FRAMES = 36  # of a sheet

_at_once = BoundedSemaphore(2)  # decoders in one replica


def thumbnail(folder: RunFolder, manifest: Manifest, index: int | None = None) -> bytes:
    """The first frame of a segment as WebP; of the first one that is there if `index` is None. Raises Refusal."""
    record = record_at(manifest, manifest.dropped_before if index is None else index)
    return _encoded(_still(folder.path, record, _size(manifest, STILL_PIXELS)), "WEBP")


def spritesheet(folder: RunFolder, manifest: Manifest) -> bytes:
    """First frames of at most `MOST_FRAMES` segments in rows, as one JPEG. Raises Refusal."""
    there = manifest.segments[manifest.dropped_before :]
    chosen = [record_at(manifest, there[at].index) for at in sampled(len(there), MOST_FRAMES)]
    if not chosen:
        record_at(manifest, 0)
    width, height = _size(manifest, SHEET_PIXELS)
    columns = math.ceil(math.sqrt(len(chosen)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(chosen) / columns) * height))
    for at, record in enumerate(chosen):
        sheet.paste(_still(folder.path, record, (width, height)), (at % columns * width, at // columns * height))
    return _encoded(sheet, "JPEG")


def record_at(manifest: Manifest, index: int) -> SegmentRecord:
    """A committed segment whose media are there. Raises Refusal, SegmentGone."""
    if index >= len(manifest.segments):
        if not manifest.segments:
            raise refuse("not_ready", "No segment of this video is committed yet; ask again when one is.")
        said = f"the last committed segment of this video is {len(manifest.segments) - 1}."
        raise refuse("segment_not_found", f"There is no segment {index}; {said}", "segment")
    if index < manifest.dropped_before:
        said = f"the first that is there is {manifest.dropped_before}"
        raise SegmentGone(f"segment {index} is dropped (output.keep_segments); {said}.")
    return manifest.segments[index]


def _size(manifest: Manifest, longest: int) -> tuple[int, int]:
    """Width and height of a still whose longer side is no more than `longest` pixels, both even."""
    width, height = manifest.begun.width, manifest.begun.height
    scale = min(1.0, longest / max(width, height))
    return tuple(max(2, round(side * scale / 2) * 2) for side in (width, height))  # type: ignore[return-value]


def _still(folder: Path, record: SegmentRecord, size: Sequence[int]) -> Image.Image:
    width, height = size
    raw = _decoded(folder / "init.mp4", folder / record.media, record.digests.get("media", ""), width, height)
    return Image.frombytes("RGB", (width, height), raw)


@lru_cache(maxsize=512)
def _decoded(init: Path, media: Path, digest: str, width: int, height: int) -> bytes:
    """The first frame [H, W, 3] as bytes; a file's digest tells it from an earlier one of its name."""
    try:
        with _at_once:
            pieces = [init.read_bytes(), media.read_bytes()]
            form = ("-frames:v", "1", "-vf", f"scale={width}:{height}", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
            raw = ffmpeg("-i", "-", *form, stdin=pieces, subject=media.name)
    except (EncodeError, OSError):
        raw = b""
    if len(raw) != width * height * 3:
        raise refuse("video_damaged", f"The file of segment {media.name} cannot be decoded.")
    return raw


def _encoded(picture: Image.Image, form: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, form, quality=85)
    return data.getvalue()
