"""What a run's bits depend on beside its configuration."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as AttentionBackends

from edit_ray.engine.options import Mode


def provenance_of(device: torch.device, threads: int, mode: Mode, fp8: bool = False) -> dict[str, str | int]:
    """Two processes for which this is equal make the same frames of one configuration, in the mode `exact`."""
    on_cpu = device.type == "cpu"
    return {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}" if on_cpu else torch.cuda.get_device_name(device),
        "torch": str(torch.__version__),  # a plain one: what torch gives can only be read where torch is
        "diffusers": diffusers.__version__,
        "threads": threads,
        "attention": AttentionBackends.get_active_backend()[0].value,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "mode": f"{mode}, fp8" if fp8 else mode,
    }
