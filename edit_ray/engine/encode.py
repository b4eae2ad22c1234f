"""From frames to normalised latents: the way back from `edit_ray.engine.decode`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Frames, uint8 [F, H, W, 3], as video [1, 3, F, H, W] in [-1, 1]: the inverse of `decode.to_uint8`."""
    return (torch.tensor(frames).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def normalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """What the VAE encodes [B, C, T, h, w] in the scale that the transformer sees."""
    shape = (1, vae_config["z_dim"], 1, 1, 1)
    mean = torch.tensor(vae_config["latents_mean"]).view(shape).to(latents.device, latents.dtype)
    inverse_std = 1.0 / torch.tensor(vae_config["latents_std"]).view(shape).to(latents.device, latents.dtype)
    return (latents - mean) * inverse_std


@torch.no_grad()
def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """A clip [B, 3, 4(k-1)+1, H, W] in [-1, 1] as normalised latents [B, C, k, h, w], float32.

    The most likely latents, nothing is drawn. Raises `ValueError` for another number of frames.
    """
    if video.shape[2] % 4 != 1:
        raise ValueError(f"A clip of {video.shape[2]} frames cannot be encoded; it takes 4k+1.")
    moments = vae.encode(video.to(vae.device, vae.dtype)).latent_dist
    return normalise(moments.mode().float(), vae.config)
