"""The denoising loop of Wan text-to-video, open on one page.

Shapes: B videos (prompts times videos per prompt), C latent channels, T latent frames, h x w latent pixels, L text
tokens of width D. It takes the same steps in the same order of arithmetic as diffusers' `WanPipeline`, so its latents
are bit-equal to those of diffusers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

from edit_ray.engine.caching import expert_name
from edit_ray.engine.continuity import Held, hold

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What one call of the loop denoises, and under whose eyes."""

    latents: Tensor  # [B, C, T, h, w] float32 noise
    prompt_embeds: Tensor  # [B, L, D] in the transformer's dtype
    negative_prompt_embeds: Tensor | None  # [B, L, D], needed where there is guidance
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None  # of the low-noise expert
    held: Held | None = None  # what the first k latent slots are
    callback: StepCallback | None = None
    callback_tensor_inputs: tuple[str, ...] = ("latents",)
    reset_cache: bool = True  # whether what the cache stored in earlier calls is dropped
    prefetch_reuse: bool = False


def denoise(pipe: Any, request: Request) -> Tensor:
    """Denoise `request.latents` with the transformers and the noise scheduler of `pipe`; returns [B, C, T, h, w].

    The first k slots stay what `held` says, at the noise level of every step. What the callback changes on `pipe`
    (`_interrupt`, `scheduler`, …) acts from the next step on; of `_guidance_scale`, as in diffusers, only whether it is
    above 1.
    """
    cond, uncond = request.prompt_embeds, request.negative_prompt_embeds  # [B, L, D]
    x, held = request.latents, request.held  # [B, C, T, h, w]
    clean = clean_tokens(x, held) if pipe.config.expand_timesteps else None

    pipe.scheduler.set_timesteps(request.num_inference_steps, device=x.device)
    timesteps = pipe.scheduler.timesteps  # [S], from high noise to low
    warmup = len(timesteps) - request.num_inference_steps * pipe.scheduler.order
    pipe.scheduler.set_begin_index(0)
    pipe._num_timesteps = len(timesteps)

    ahead = pipe.ahead.loop(pipe, x, cond)
    cached = pipe.cached_call(request.reset_cache, request.prefetch_reuse)
    with ahead as schedule, cached, pipe.progress_bar(total=request.num_inference_steps) as bar:
        x = hold(x, held, schedule.sigma(pipe.scheduler, 0))
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            model, scale = expert_at(pipe, schedule.timestep(i), request)
            timestep = t.expand(len(x)) if clean is None else (clean * t)[None].expand(len(x), -1)  # [B] or [B, tokens]
            inputs = {"hidden_states": x.to(request.prompt_embeds.dtype), "timestep": timestep}  # x: [B, C, T, h, w]
            inputs |= {"attention_kwargs": pipe.attention_kwargs, "return_dict": False}
            where: dict[str, Any] = {"step_index": i, "num_inference_steps": len(timesteps)}
            where["sigma"] = schedule.sigma(pipe.scheduler, i)

            guided = pipe.do_classifier_free_guidance
            beside = pipe.cfg_parallel.forward(model, uncond, inputs, where) if guided and pipe.cfg_parallel else None
            with beside or nullcontext() as begun, model.cache_context("cond", **where):
                noise_pred = model(encoder_hidden_states=cond, **inputs)[0]  # [B, C, T, h, w]
            if begun is not None:
                noise_uncond = begun.result().to(x.device, non_blocking=True)  # [B, C, T, h, w]
            elif guided:
                with model.cache_context("uncond", **where):
                    noise_uncond = model(encoder_hidden_states=uncond, **inputs)[0]  # [B, C, T, h, w]
            if guided:
                noise_pred = noise_uncond + scale * (noise_pred - noise_uncond)

            x = pipe.scheduler.step(noise_pred, t, x, return_dict=False)[0]  # [B, C, T, h, w]
            sigma = schedule.sigma(pipe.scheduler, i + 1)
            x = hold(x, held, sigma)

            if request.callback is not None:
                tensors: dict[str, Any] = {"latents": x, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
                changed = request.callback(pipe, i, t, {name: tensors[name] for name in request.callback_tensor_inputs})
                check_changed(changed)
                x = hold(changed.pop("latents", x), held, sigma)
                cond = changed.pop("prompt_embeds", cond)
                uncond = changed.pop("negative_prompt_embeds", uncond)
                pipe.ahead.refresh()
            if i == len(timesteps) - 1 or (i >= warmup and (i + 1) % pipe.scheduler.order == 0):
                bar.update()
    pipe._current_timestep = None
    return x


def check_changed(changed: object) -> None:
    """Raises TypeError for what a callback must not return."""
    if not isinstance(changed, dict):
        given = changed if changed is None else type(changed).__name__
        raise TypeError(
            f"callback_on_step_end returned {given}; it must return a dict of the tensors that it changes, such as "
            '{"latents": latents}, and {} where it changes none.'
        )


def expert_at(pipe: WanPipeline, t: Tensor, request: Request) -> tuple[WanTransformer3DModel, float | None]:
    """The transformer of timestep `t` and its guidance scale."""
    if expert_name(pipe, t) == "transformer":
        return pipe.transformer, request.guidance_scale
    return pipe.transformer_2, request.guidance_scale_2


def clean_tokens(latents: Tensor, held: Held | None) -> Tensor:
    """A factor for the timestep of each token [T·h/2·w/2]: 0 where it belongs to a clean context, else 1."""
    _, _, frames, height, width = latents.shape
    factor = torch.ones(frames, height, width, dtype=torch.float32, device=latents.device)
    if held is not None and held.noise is None:
        factor[: held.slots] = 0
    return factor[:, ::2, ::2].flatten()
