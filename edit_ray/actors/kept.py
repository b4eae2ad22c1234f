"""Which segments can still be made, or made again, from the latents that a run has kept (`output.keep_segments`)."""

from __future__ import annotations

from edit_ray.actors.messages import RunSpec
from edit_ray.engine.model_info import read_model_info
from edit_ray.runs.retention import first_made_again


def can_be_made(spec: RunSpec, segment_index: int) -> bool:
    """Whether the latents are there that a segment continues and from which its decoder's state is rebuilt.

    Raises ModelError.
    """
    if spec.config.output.keep_segments is None or not spec.layout.history_latents:
        return True
    needed = spec.layout.history_latents + read_model_info(spec.config.model.path).lookback_latents
    return all(path.exists() for path in spec.context(segment_index, needed))


def can_be_made_again(spec: RunSpec, committed: int) -> bool:
    """Whether segments before the first `committed` can be made again for those after them, which reuse residuals.

    Raises ModelError.
    """
    first = first_made_again(committed, spec.config.cache.reuse_window, spec.planned_from)
    there = all(spec.latents(index).exists() for index in range(first, committed))
    return first == committed or (there and can_be_made(spec, first))
