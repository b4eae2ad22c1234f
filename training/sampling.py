"""Samples for the evaluation: clips from text, and segments that continue the latents of the one before."""

import torch
from torch import Tensor

from edit_ray import EditWanPipeline
from edit_ray.engine.decode import denormalise

STEPS = 30
GUIDANCE = 4.0
NUM_FRAMES = 33
HISTORY = 3  # latents of the predecessor that a continuation is shown


def sample_latents(
    pipe: EditWanPipeline,
    prompts: list[str],
    seeds: list[int],
    history: Tensor | None = None,
    num_inference_steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    negative_prompts: list[str] | None = None,
    size: tuple[int, int] = (128, 128),
    num_frames: int = NUM_FRAMES,
) -> Tensor:
    """Normalised latents [B, C, T, H/8, W/8], one seed a sample; `history` [B, C, k, H/8, W/8] is what they continue.

    Noise is drawn on the CPU, a sample at a time: the same on every device and in every batch.
    """
    shape = (pipe.vae.config.z_dim, 1 + num_frames // 4, size[0] // 8, size[1] // 8)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents: Tensor = pipe(
        prompts,
        negative_prompts,
        height=size[0],
        width=size[1],
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latents=noise,
        history=history,
        output_type="latent",
        return_dict=False,
    )[0]
    return latents


@torch.no_grad()
def decode(pipe: EditWanPipeline, latents: Tensor) -> Tensor:
    """Clips [B, 3, 4k+1, H, W] in [-1, 1] from normalised latents [B, C, k+1, H/8, W/8]."""
    frames: Tensor = pipe.vae.decode(denormalise(latents, pipe.vae.config)).sample
    return frames
