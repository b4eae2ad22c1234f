"""What the GPU memory of a configured run depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edit_ray.engine.card_memory import Run
from edit_ray.engine.causal_options import options_of_run
from edit_ray.engine.model_info import read_model_info
from edit_ray.engine.reuse import branches_of

if TYPE_CHECKING:
    from edit_ray.config.model import Config


def run_of(config: Config) -> Run:
    """The run without its residuals. Raises OSError for a file of weights that is not there, ModelError."""
    sampling, model = config.sampling, config.model
    causal = read_model_info(model.path).causal if config.continuity.causal else None
    options = None if causal is None else options_of_run(causal, config.continuity, sampling)
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
        window=0 if options is None else options.window,
        chunk_size=0 if options is None else options.chunk_size,
        rotated_keys=options is not None and options.rope == "relative",
    )
