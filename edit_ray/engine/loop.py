"""The denoising loop of Wan, on one page.

Shapes: B videos (prompts times videos per prompt), C latent channels, T latent frames, h x w latent pixels, L text
tokens of width D. Steps and order of arithmetic are those of diffusers' Wan pipelines, so latents are bit-equal.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, WanPipeline, WanTransformer3DModel
from torch import Generator, Tensor

from edit_ray.engine.caching import expert_name
from edit_ray.engine.conditioning import Conditioning, StepSchedule
from edit_ray.engine.continuity import ContextLatents, hold

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What one call of the loop denoises, and who observes it."""

    conditions: Conditioning  # the latents [B, C, T, h, w] to begin with, and what the transformer gets besides them
    prompt_embeds: Tensor  # [B, L, D] in the transformer's dtype
    negative_prompt_embeds: Tensor | None  # [B, L, D], needed with guidance
    schedule: StepSchedule
    guidance_scale: float
    guidance_scale_2: float | None = None  # of the low-noise expert
    generator: Generator | list[Generator] | None = None  # for noise schedulers that draw in each step
    context: ContextLatents | None = None  # what the first k latent slots are held to
    callback: StepCallback | None = None
    callback_tensor_inputs: tuple[str, ...] = ("latents",)
    reset_cache: bool = True  # whether to drop what the cache stored in earlier calls
    prefetch_reuse: bool = False


def denoise(pipe: Any, request: Request) -> Tensor:
    """Denoise a request with the transformers and the noise scheduler of `pipe`; returns latents [B, C, T, h, w].

    The first k slots are held to the request's context, at the noise level of every step. What the callback changes on
    `pipe` (`_interrupt`, `scheduler`, …) acts from the next step on; of `_guidance_scale`, as in diffusers, only
    whether it is above 1.
    """
    cond, uncond = request.prompt_embeds, request.negative_prompt_embeds  # [B, L, D]
    conditions, context = request.conditions, request.context
    x = conditions.latents  # [B, C, T, h, w]
    clean = clean_tokens(x, context) if pipe.config.expand_timesteps else None

    request.schedule.set_on(pipe.scheduler, x.device)
    begin, order = conditions.begin_index, pipe.scheduler.order
    timesteps = pipe.scheduler.timesteps[begin:]  # [S], from high noise to low
    num_inference_steps = request.schedule.num_inference_steps - begin // order
    warmup = len(timesteps) - num_inference_steps * order
    pipe.scheduler.set_begin_index(begin)
    pipe._num_timesteps = len(timesteps)

    precomputed = pipe.precompute.loop(pipe, x, cond)
    cached = pipe.cached_call(request.reset_cache, request.prefetch_reuse, begin)
    with precomputed as schedule, cached, pipe.progress_bar(total=num_inference_steps) as bar:
        pipe.announce_blocks(begin)
        x = hold(x, context, schedule.sigma(pipe.scheduler, begin))
        for i, t in enumerate(timesteps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            model, scale = expert_at(pipe, schedule.timestep(begin + i), request)
            timestep = t.expand(len(x)) if clean is None else (clean * t)[None].expand(len(x), -1)  # [B] or [B, tokens]
            shown = x if conditions.channels is None else torch.cat([x, conditions.channels], 1)  # [B, C + M, T, h, w]
            inputs = {"hidden_states": shown.to(request.prompt_embeds.dtype), "timestep": timestep}
            inputs |= {**conditions.arguments, "attention_kwargs": pipe.attention_kwargs, "return_dict": False}
            where: dict[str, Any] = {"step_index": i, "num_inference_steps": len(timesteps)}
            where["sigma"] = schedule.sigma(pipe.scheduler, begin + i)

            noise_pred = predict_noise(pipe, model, scale, cond, uncond, inputs, where)  # [B, C, T, h, w]
            drawn = {"generator": request.generator} if isinstance(pipe.scheduler, FlowMatchLCMScheduler) else {}
            x = pipe.scheduler.step(noise_pred, t, x, **drawn, return_dict=False)[0]  # [B, C, T, h, w]
            sigma = schedule.sigma(pipe.scheduler, begin + i + 1)
            x = hold(x, context, sigma)

            if request.callback is not None:
                tensors: dict[str, Any] = {"latents": x, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
                changed = request.callback(pipe, i, t, {name: tensors[name] for name in request.callback_tensor_inputs})
                check_changed(changed)
                x = hold(changed.pop("latents", x), context, sigma)
                cond = changed.pop("prompt_embeds", cond)
                uncond = changed.pop("negative_prompt_embeds", uncond)
                pipe.precompute.refresh()
            if i == len(timesteps) - 1 or (i >= warmup and (i + 1) % order == 0):
                bar.update()
    pipe._current_timestep = None
    return x


def predict_noise(
    pipe: Any,
    model: Any,
    scale: float | None,
    cond: Tensor,
    uncond: Tensor | None,
    inputs: dict[str, Any],
    where: dict[str, Any],
) -> Tensor:
    """The noise prediction [B, C, T, h, w] of one step: of the branch "cond", and with guidance of both.

    `inputs` are the forward's arguments besides the text, `where` those of its `cache_context`.
    """
    guided = pipe.do_classifier_free_guidance
    beside = pipe.cfg_parallel.forward(model, uncond, inputs, where) if guided and pipe.cfg_parallel else None
    with beside or nullcontext() as begun, model.cache_context("cond", **where):
        noise_pred: Tensor = model(encoder_hidden_states=cond, **inputs)[0]
    if not guided:
        return noise_pred
    if begun is not None:
        noise_uncond = begun.result().to(noise_pred.device, non_blocking=True)
    else:
        with model.cache_context("uncond", **where):
            noise_uncond = model(encoder_hidden_states=uncond, **inputs)[0]
    guided_pred: Tensor = noise_uncond + scale * (noise_pred - noise_uncond)
    return guided_pred


def check_changed(changed: object) -> None:
    """Raise TypeError unless a callback returned a dict."""
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


def clean_tokens(latents: Tensor, context: ContextLatents | None) -> Tensor:
    """A factor for the timestep of each token [T·h/2·w/2]: 0 where the context is clean, else 1."""
    _, _, frames, height, width = latents.shape
    factor = torch.ones(frames, height, width, dtype=torch.float32, device=latents.device)
    if context is not None and context.noise is None:
        factor[: context.slots] = 0
    if context is not None and context.end is not None:
        factor[-1] = 0
    return factor[:, ::2, ::2].flatten()
