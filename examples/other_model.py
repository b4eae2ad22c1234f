"""Caching a video transformer without a built-in adapter: LTX-Video, with the adapter in this file.

    python examples/other_model.py

The weights are random and tiny: it takes seconds on a CPU and downloads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from torch import Tensor, nn

from edit_ray.cache import apply_cache_on_transformer, register_adapter, remove_cache_from_transformer
from edit_ray.cache.adapters import argument

STEPS, GUIDANCE_SCALE = 12, 3.0
FRAMES, HEIGHT, WIDTH, CHANNELS, TEXT = 3, 4, 6, 8, 32


@register_adapter("LTXVideoTransformer3DModel")
class LTXAdapter:
    """See `edit_ray.cache.ModelAdapter` for what each method returns."""

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        return list(transformer.transformer_blocks)  # type: ignore[arg-type]

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden: Tensor = argument(args, kwargs, 0, "hidden_states")
        return hidden

    def encoder_hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        text: Tensor | None = argument(args, kwargs, 1, "encoder_hidden_states")
        return text

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        tokens: Tensor = argument(args, kwargs, 0, "hidden_states")  # [B, T·h·w, C]
        size = [argument(args, kwargs, i, name) for i, name in ((4, "num_frames"), (5, "height"), (6, "width"))]
        return tokens.unflatten(1, size).movedim(-1, 1), argument(args, kwargs, 2, "timestep")

    def embed_timestep(self, transformer: nn.Module, timestep: Tensor) -> tuple[Tensor, Tensor]:
        norm: Any = transformer.time_embed
        embedder = norm.emb.timestep_embedder
        e = embedder(norm.emb.time_proj(timestep).to(embedder.linear_1.weight.dtype)).float()
        e0 = F.linear(norm.silu(e), norm.linear.weight.float(), norm.linear.bias.float())
        return e, e0.unflatten(1, (6, -1))


def tiny_ltx() -> LTXVideoTransformer3DModel:
    """LTX-Video's transformer with a few thousand random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LTXVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=6,
            caption_channels=TEXT,
        ).eval()


@torch.no_grad()
def denoise(transformer: LTXVideoTransformer3DModel, seed: int = 0) -> Tensor:
    """Latents [B, T·h·w, C] from noise, in a loop such as pipelines have.

    All that the cache needs of it is `cache_context` around each forward, with its branch and its step.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, FRAMES * HEIGHT * WIDTH, CHANNELS, generator=generator)
    texts = {name: torch.randn(1, 8, TEXT, generator=generator) for name in ("cond", "uncond")}
    inputs = {"encoder_attention_mask": torch.ones(1, 8), "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps):
        predicted = {}
        for branch, text in texts.items():
            with transformer.cache_context(branch, step_index=i, num_inference_steps=STEPS):
                predicted[branch] = transformer(x, text, t.expand(1), return_dict=False, **inputs)[0]
        noise = predicted["uncond"] + GUIDANCE_SCALE * (predicted["cond"] - predicted["uncond"])
        x = scheduler.step(noise, t, x, return_dict=False)[0]
    return x


def main() -> None:
    torch.set_num_threads(1)  # models this small run fastest on one
    transformer = tiny_ltx()
    uncached = denoise(transformer)
    for threshold in (0.0, 0.08, 0.12):
        cache = apply_cache_on_transformer(transformer, "fbcache", STEPS, rel_l1_thresh=threshold)
        latents = denoise(transformer)
        difference = (latents - uncached).abs().mean() / uncached.abs().mean()
        mask = "".join("■" if computed else "·" for computed in cache.record.mask())
        print(
            f"rel_l1_thresh={threshold:<4}  {mask}  equal: {torch.equal(latents, uncached)!s:5}  {difference:.2%} off"
        )
        for branch, counts in cache.stats.items():
            print(f"    {branch:6}  {counts.computed} computed, {counts.skipped} skipped, {counts.bytes} bytes stored")
        remove_cache_from_transformer(transformer)
    print(f"equal again without the cache: {torch.equal(denoise(transformer), uncached)}")


if __name__ == "__main__":
    main()
