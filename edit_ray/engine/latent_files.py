"""Latents on disk: each file holds what one segment added, so that the files in order are the run's latent stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from edit_ray.errors import EditRayError
from edit_ray.files import digest_of, read_bytes, write_atomic


def save_latents(path: Path, latents: torch.Tensor) -> int:
    """Writes [1, C, t, h, w], float32, so that a reader sees all of it or nothing; returns the file's digest."""
    data = save({"latents": latents.detach().to("cpu", torch.float32).contiguous()})
    write_atomic(path, data)
    return digest_of(data)


def load_latents(path: Path) -> torch.Tensor:
    """[1, C, t, h, w], float32, on the CPU.

    Raises EditRayError when the file is missing or not what `save_latents` writes, another OSError when it cannot be
    read now.
    """
    try:
        latents = load(read_bytes(path))["latents"]
    except (FileNotFoundError, KeyError, SafetensorError) as broken:
        raise EditRayError(f"cannot read the latents in {path}: {broken}") from None
    if latents.ndim != 5 or latents.shape[0] != 1 or latents.dtype != torch.float32:
        raise EditRayError(f"{path} holds {latents.dtype} {list(latents.shape)}, not float32 [1, C, t, h, w] latents")
    return latents


def latent_tail(paths: Sequence[Path], count: int) -> torch.Tensor:
    """The last `count` latents [1, C, count, h, w] of the stream that `paths` hold; fewer where it is shorter."""
    tail: list[torch.Tensor] = []
    missing = count
    for path in reversed(paths):
        if missing <= 0:
            break
        latents = load_latents(path)[:, :, -missing:]
        tail.insert(0, latents)
        missing -= latents.shape[2]
    return torch.cat(tail, dim=2)
