"""How a segment continues its predecessor: what the first k of its T latent slots are held to, and latents on disk.

`history` shows the context clean, at timestep 0, to models with per-token timesteps. `overlap` shows it at the noise
level of each step, which any text-to-video model knows, so the other slots fit to it: inpainting along time, after
A. Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models" (2022), for flow matching and
without its resampling. Which frames that makes is the arithmetic of `edit_ray.runs.layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edit_ray.errors import EditRayError
from edit_ray.files import digest_of, read_bytes, write_atomic


@dataclass(frozen=True)
class ContextLatents:
    """What the first k slots of a segment are held to while it is denoised, and the last one to `end`, if given.

    `context` [B, C, k, h, w] are clean latents. With `noise` of the same shape they are mixed with it as sigma says;
    without, they stay clean and see timestep 0, as `end` [B, C, 1, h, w] always does.
    """

    context: Tensor
    noise: Tensor | None = None
    end: Tensor | None = None

    @property
    def slots(self) -> int:
        """The number of slots, k."""
        return self.context.shape[2]

    def at(self, sigma: float) -> Tensor:
        """The k slots at a noise level from 1 to 0, [B, C, k, h, w]."""
        return self.context if self.noise is None else (1 - sigma) * self.context + sigma * self.noise


def hold(latents: Tensor, context: ContextLatents | None, sigma: float) -> Tensor:
    """`latents` [B, C, T, h, w] with the context in their first k slots, at this noise level; unchanged without one."""
    if context is None:
        return latents
    after = [] if context.end is None else [context.end]
    return torch.cat([context.at(sigma), latents[:, :, context.slots : latents.shape[2] - len(after)], *after], dim=2)


def check_context(name: str, context: Tensor, latents: Tensor) -> Tensor:
    """Return the argument `name` on the device and in the dtype of `latents` [B, C, T, h, w].

    Raises `ValueError` unless it is [B, C, k, h, w] with 1 <= k < T.
    """
    batch, channels, slots, height, width = latents.shape
    given = tuple(context.shape)
    if len(given) != 5 or given[2] == 0 or given != (batch, channels, given[2], height, width):
        raise ValueError(
            f"`{name}` has the shape {given}; it must be [B, C, k, h, w] = "
            f"({batch}, {channels}, k, {height}, {width}) for these latents."
        )
    if given[2] >= slots:
        raise ValueError(
            f"{given[2]} latents of `{name}` leave nothing to denoise in a window of {slots} latent frames; "
            f"there must be 1 to {slots - 1}."
        )
    return context.to(device=latents.device, dtype=latents.dtype)


def match_statistics(latents: Tensor, reference: Tensor, factor: float) -> Tensor:
    """`latents` [B, C, n, h, w], moved by `factor` (0 to 1) towards the mean and deviation of the reference's channels.

    Source: X. Huang, S. Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization" (2017);
    here statistics are over time as well.
    """
    dims = (2, 3, 4)
    deviation = latents.std(dims, keepdim=True).clamp_min(1e-6)
    moved = (latents - latents.mean(dims, keepdim=True)) / deviation
    moved = moved * reference.std(dims, keepdim=True) + reference.mean(dims, keepdim=True)
    return latents + factor * (moved - latents)


def save_latents(path: Path, latents: Tensor) -> int:
    """Write [1, C, t, h, w], float32, so that a reader sees all of it or nothing; return the file's digest."""
    data = save({"latents": latents.detach().to("cpu", torch.float32).contiguous()})
    write_atomic(path, data)
    return digest_of(data)


def load_latents(path: Path) -> Tensor:
    """[1, C, t, h, w], float32, on the CPU.

    Raises EditRayError if the file is missing or not what `save_latents` writes, another OSError if it cannot be read
    now.
    """
    try:
        latents = load(read_bytes(path))["latents"]
    except (FileNotFoundError, KeyError, SafetensorError) as broken:
        raise EditRayError(f"cannot read the latents in {path}: {broken}") from None
    if latents.ndim != 5 or latents.shape[0] != 1 or latents.dtype != torch.float32:
        raise EditRayError(f"{path} holds {latents.dtype} {list(latents.shape)}, not float32 [1, C, t, h, w] latents")
    return latents


def latent_tail(paths: Sequence[Path], count: int) -> Tensor:
    """The last `count` latents [1, C, count, h, w] of the stream in the files `paths`; fewer if it is shorter."""
    tail: list[Tensor] = []
    for path in reversed(paths):
        tail.insert(0, load_latents(path)[:, :, -count:])
        count -= tail[0].shape[2]
        if count <= 0:
            break
    return torch.cat(tail, dim=2)
