"""Disk space: which files of old segments may be removed, and how much a run will still write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edit_ray.runs.run_plan import FrameLayout


@dataclass(frozen=True)
class Retention:
    """The media of segments before `media_from` may be removed, and the latents of those before `latents_from` but for
    the segments in `kept`.
    """

    media_from: int
    latents_from: int
    kept: tuple[int, ...] = ()

    def latents_since(self, before: Retention) -> list[int]:
        """The segments whose latents may be removed now, and could not be `before`."""
        candidates = {*range(before.latents_from, self.latents_from), *before.kept}
        return sorted(candidates - {*self.kept})


KEEP_ALL = Retention(0, 0)


def retention(
    committed: int,
    keep_segments: int | None,
    needed_latents: int,
    layout: FrameLayout,
    reuse_window: int = 0,
    planned_from: int = 0,
    seen: Iterable[int] = (),
) -> Retention:
    """What may be removed once segments 0 … `committed`-1 are durable; `keep_segments` None keeps everything.

    A segment is made from the last `needed_latents` latents of the stream before it: those that it continues, and
    those from which the decoder's state is rebuilt; and from those of the segments that are `seen`.
    """
    if keep_segments is None:
        return KEEP_ALL
    media_from = max(0, committed - keep_segments)
    first = first_made_again(committed, reuse_window, planned_from)
    latents_from = min(media_from, first_needed(first, needed_latents, layout))
    return Retention(media_from, latents_from, tuple(sorted(index for index in {*seen} if index < latents_from)))


def first_made_again(committed: int, reuse_window: int, planned_from: int) -> int:
    """The first segment that may still have to be made, or made again because its residuals were lost.

    Segments reuse residuals of those in their window, back to `planned_from`; a segment that others reuse reuses none.
    """
    return min(committed, max(planned_from, committed - reuse_window))


def first_needed(segment_index: int, needed_latents: int, layout: FrameLayout) -> int:
    """The first segment that holds some of the last `needed_latents` latents before a segment."""
    position, first = layout.first_latent(segment_index), segment_index
    while first > 0 and position - layout.first_latent(first) < needed_latents:
        first -= 1
    return first


BITS_PER_PIXEL = 0.5
"""Bits per pixel of H.264 before anything was measured: noisy frames at crf 18 take less, clean ones a tenth of it."""

COPIES_OF_MEDIA = 3
"""A segment's frames are in its own file, in stream.mp4 and in final.mp4."""

MARGIN_BYTES = 64 << 20
"""Left free for other users of the file system."""


def shortage(segments: int, latents: int, media: int, keep_segments: int | None, free: int) -> str | None:
    """One sentence if `segments` more segments do not fit into `free` bytes of the disk.

    `latents` and `media` are bytes per segment; about `keep_segments` are kept at a time (None: all).
    """
    kept = segments if keep_segments is None else min(segments, keep_segments + 1)
    needed = kept * (latents + COPIES_OF_MEDIA * media)
    if needed + MARGIN_BYTES <= free:
        return None
    return (
        f"what is still to come takes about {_written(needed)} of disk, {_written(MARGIN_BYTES)} besides must stay "
        f"free, and {_written(free)} are free; free some, choose another --output, or bound what stays with "
        "output.keep_segments"
    )


def _written(count: int) -> str:
    """In a unit in which the number is not zero."""
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.0f} {unit}"
    return f"{count} bytes"
