"""Samples for the evaluation: clips from text, segments that continue the latents of the one before, and streams."""

from pathlib import Path

import torch
from torch import Tensor

from edit_ray import EditCausalWanPipeline, EditWanPipeline
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


def load_causal(folder: Path, bidirectional: EditWanPipeline) -> EditCausalWanPipeline:
    """The causal model of a folder that has the transformer alone; the other parts are the bidirectional model's."""
    shared = {name: getattr(bidirectional, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = EditCausalWanPipeline.from_pretrained(folder, torch_dtype=torch.float32, **shared)
    pipe.transformer.to(bidirectional.vae.device)
    return pipe


def stream_latents(
    pipe: EditCausalWanPipeline,
    prompts: list[str],
    seeds: list[int],
    num_chunks: int,
    size: tuple[int, int] = (128, 128),
    switch: tuple[int, list[str]] | None = None,
) -> Tensor:
    """Normalised latents [B, C, T, H/8, W/8] of so many chunks, one seed a stream.

    `switch` has the chunk from which other prompts take over, and these; K/V is computed again with them.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stream = pipe.stream(prompts, height=size[0], width=size[1], generator=generators, decode=False)
    latents = []
    for chunk in range(num_chunks):
        if switch is not None and chunk == switch[0]:
            stream.send(prompt=switch[1], switch="recache")
        latents.append(next(stream).latents)
    stream.close()
    return torch.cat(latents, 2)


@torch.no_grad()
def decode(pipe: EditWanPipeline, latents: Tensor) -> Tensor:
    """Clips [B, 3, 4k+1, H, W] in [-1, 1] from normalised latents [B, C, k+1, H/8, W/8]."""
    frames: Tensor = pipe.vae.decode(denormalise(latents, pipe.vae.config)).sample
    return frames
