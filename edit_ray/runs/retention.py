"""Which files of old segments may go (`output.keep_segments`), and which others still need them."""

from __future__ import annotations

from dataclasses import dataclass

from edit_ray.runs.layout import FrameLayout


@dataclass(frozen=True)
class Retention:
    """Segments before `media_from` need no media any more, those before `latents_from` no latents."""

    media_from: int
    latents_from: int


KEEP_ALL = Retention(0, 0)


def retention(
    committed: int,
    keep_segments: int | None,
    needed_latents: int,
    layout: FrameLayout,
    reuse_window: int = 0,
    planned_from: int = 0,
) -> Retention:
    """What may go of a run once segments 0 … `committed`-1 are durable; `keep_segments` None keeps everything.

    A segment is made from the last `needed_latents` latents of the stream before it: those that it continues, and
    those from which the decoder's state is rebuilt.
    """
    if keep_segments is None:
        return KEEP_ALL
    media_from = max(0, committed - keep_segments)
    first = first_made_again(committed, reuse_window, planned_from)
    return Retention(media_from, min(media_from, first_needed(first, needed_latents, layout)))


def first_made_again(committed: int, reuse_window: int, planned_from: int) -> int:
    """The first segment that has to be made once `committed` are there, or made again if its residuals are lost.

    Segments reuse those of their window, back to `planned_from`; one whose residuals others reuse has reused none.
    """
    return min(committed, max(planned_from, committed - reuse_window))


def first_needed(segment_index: int, needed_latents: int, layout: FrameLayout) -> int:
    """The first segment among whose latents are the last `needed_latents` before a segment."""
    position, first = layout.first_latent(segment_index), segment_index
    while first > 0 and position - layout.first_latent(first) < needed_latents:
        first -= 1
    return first
