"""What the GPU memory of a configured run depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edit_ray.engine.card_memory import Run
from edit_ray.engine.reuse import branches_of

if TYPE_CHECKING:
    from edit_ray.config.model import Config


def run_of(config: Config) -> Run:
    """The run without its residuals. Raises OSError for a file of weights that is not there."""
    sampling, model = config.sampling, config.model
    return Run(
        height=sampling.height,
        width=sampling.width,
        num_frames=sampling.num_frames,
        branches=len(branches_of(sampling)),
        tier_bytes=config.store.device_bytes if config.cache.reuse_window else 0,
        torch_dtype=model.torch_dtype,
        storage=model.storage,
        fast=config.engine.mode == "fast",
        file_bytes=model.gguf_bytes,
    )
