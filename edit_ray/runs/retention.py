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


def retention(committed: int, keep_segments: int | None, needed_latents: int, layout: FrameLayout) -> Retention:
    """What may go of a run once segments 0 … `committed`-1 are durable.

    The next segments are made from the last `needed_latents` latents of the stream: those that a segment continues, and
    those from which the decoder's state is rebuilt. `keep_segments` None keeps everything.
    """
    if keep_segments is None:
        return KEEP_ALL
    media_from = max(0, committed - keep_segments)
    position = layout.first_latent(committed)
    latents_from = media_from
    while latents_from > 0 and position - layout.first_latent(latents_from) < needed_latents:
        latents_from -= 1
    return Retention(media_from, latents_from)
