"""What a segment takes over from those before it and adds to the run's stream, from committed files alone."""

from __future__ import annotations

import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.engine.continuity import latent_tail, load_latents, match_statistics
from edit_ray.engine.segment import SegmentEngine
from edit_ray.engine.vae_stream import Preceding


def added_by(latents: torch.Tensor, spec: RunSpec, segment_index: int) -> torch.Tensor:
    """Those of a window's latents that the segment adds to the stream, their colours drawn to the first's; a run that
    begins with the user's picture has that one as its first.
    """
    first_latent, continuity = spec.layout.first_latent, spec.config.continuity
    added = latents[:, :, first_latent(segment_index) - first_latent(segment_index + 1) :]
    if segment_index == 0 and continuity.begins_with_picture:
        return torch.cat([load_latents(spec.folder.init_latents)[:, :, :1], added[:, :, 1:]], dim=2)
    if continuity.adain and segment_index:
        return match_statistics(added, load_latents(spec.latents(0)), continuity.adain)
    return added


def context_of(engine: SegmentEngine, spec: RunSpec, segment_index: int) -> dict[str, torch.Tensor]:
    """What a segment continues, whatever this process has seen of the run: arguments of `SegmentEngine.denoise`."""
    if segment_index == 0:
        continuity = spec.config.continuity
        if continuity.init is None:
            return {}
        return {continuity.mode: load_latents(spec.folder.init_latents)[:, :, -continuity.init_latents :]}
    position, preceding = spec.layout.first_latent(segment_index), preceding_of(spec, segment_index)
    return engine.context(
        spec.config.continuity,
        spec.key,
        position=position,
        preceding=preceding,
        tiled_from=tiled_position(spec),
    )


def tiled_position(spec: RunSpec) -> int | None:
    """The latent of the run's stream from which on frames are decoded in tiles."""
    return None if spec.first_tiled is None else spec.layout.first_latent(spec.first_tiled)


def preceding_of(spec: RunSpec, segment_index: int) -> Preceding:
    """Reads the last latents of the stream before a segment."""

    def preceding(count: int) -> torch.Tensor:
        # Each segment adds one latent at least.
        segments = range(max(0, segment_index - count), segment_index)
        before = [spec.latents(index) for index in segments]
        if spec.layout.init_latents and segments.start == 0:
            before.insert(0, spec.folder.init_latents)
        return latent_tail(before, count)

    return preceding
