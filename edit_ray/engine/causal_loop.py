"""The denoising loop of a causal model, on one page: one chunk, from noise to its place in the window.

Shapes: B videos, C latent channels, c latent frames of a chunk, h x w latent pixels, L text tokens of width D.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import FlowMatchLCMScheduler
from torch import Generator, Tensor, nn

from edit_ray.engine.causal_attention import CausalAttention
from edit_ray.engine.conditioning import StepSchedule
from edit_ray.engine.loop import StepCallback, check_changed


@dataclass(frozen=True)
class ChunkRequest:
    """What one call of the loop denoises, and who observes it."""

    index: int  # of the chunk
    latents: Tensor  # [B, C, c, h, w], noise
    attention: CausalAttention  # with the K/V of the chunks before
    schedule: StepSchedule
    generators: Callable[[int], list[Generator]]  # for the fresh noise of a step, one for each video
    prompt_embeds: Tensor  # [B, L, D] in the transformer's dtype
    negative_prompt_embeds: Tensor | None  # [B, L, D], needed with guidance
    context_noise: float = 0.0  # the timestep at which the finished chunk is shown to the model
    callback: StepCallback | None = None
    callback_tensor_inputs: tuple[str, ...] = ("latents",)


def denoise_chunk(pipe: Any, request: ChunkRequest) -> Tensor:
    """Denoise a chunk with the transformer and the noise scheduler of `pipe`; returns latents [B, C, c, h, w].

    Each step's forward writes the chunk's K/V into its slot, and a last one, of the clean chunk, what later chunks
    attend to. The residual cache of `pipe` restarts with each chunk. What the callback changes acts as in `loop.py`.
    """
    cond, uncond = request.prompt_embeds, request.negative_prompt_embeds  # [B, L, D]
    x = request.latents  # [B, C, c, h, w]

    request.schedule.set_on(pipe.scheduler, x.device)
    pipe.scheduler.set_begin_index(0)
    timesteps = pipe.scheduler.timesteps  # [S], from high noise to low
    pipe._num_timesteps = len(timesteps)

    chunk = request.attention.chunk(request.index, forwards=len(timesteps) + 1)
    with pipe.precompute.loop(pipe, x, cond) as schedule, chunk:
        with pipe.cached_call(reset_cache=True, prefetch_reuse=False):
            pipe.announce_blocks(0)
            for i, t in enumerate(timesteps):
                if pipe.interrupt:
                    continue
                pipe._current_timestep = t
                where: dict[str, Any] = {"step_index": i, "num_inference_steps": len(timesteps)}
                where["sigma"] = schedule.sigma(pipe.scheduler, i)

                noise_pred = predict_noise(pipe, request.attention, x, t, cond, uncond, where)  # [B, C, c, h, w]
                redraws = isinstance(pipe.scheduler, FlowMatchLCMScheduler)
                drawn = {"generator": request.generators(i + 1)} if redraws else {}
                # In float32, as the latents: the scheduler would round them to the type of what it is given.
                x = pipe.scheduler.step(noise_pred.float(), t, x, **drawn, return_dict=False)[0]  # [B, C, c, h, w]

                if request.callback is not None:
                    tensors: dict[str, Any] = {"latents": x, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
                    shown = {name: tensors[name] for name in request.callback_tensor_inputs}
                    changed = request.callback(pipe, i, t, shown)
                    check_changed(changed)
                    x = changed.pop("latents", x)
                    cond = changed.pop("prompt_embeds", cond)
                    uncond = changed.pop("negative_prompt_embeds", uncond)
                    pipe.precompute.refresh()
        show_clean(pipe, request.attention, x, request.context_noise, cond, uncond)
    pipe._current_timestep = None
    return x


def remember_chunk(pipe: Any, request: ChunkRequest) -> None:
    """Compute the K/V of a chunk whose `latents` are clean: of a given beginning, or again for another prompt."""
    latents, texts = request.latents, (request.prompt_embeds, request.negative_prompt_embeds)
    request.schedule.set_on(pipe.scheduler, latents.device)
    with pipe.precompute.loop(pipe, latents, request.prompt_embeds), request.attention.chunk(request.index):
        show_clean(pipe, request.attention, latents, request.context_noise, *texts)


def predict_noise(
    pipe: Any,
    attention: CausalAttention,
    x: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    where: dict[str, Any],
) -> Tensor:
    """The noise prediction [B, C, c, h, w] of one step: of the branch "cond", and with guidance of both."""
    inputs: dict[str, Any] = {"hidden_states": x.to(cond.dtype), "timestep": t.expand(len(x))}
    inputs |= {"attention_kwargs": pipe.attention_kwargs, "return_dict": False}
    predicted: dict[str, Tensor] = {}
    for branch, text in texts_of(pipe, cond, uncond).items():
        attention.branch = branch
        with pipe.transformer.cache_context(branch, **where):
            predicted[branch] = pipe.transformer(encoder_hidden_states=text, **inputs)[0]
    noise_pred = predicted["cond"]
    if "uncond" in predicted:
        noise_pred = predicted["uncond"] + pipe.guidance_scale * (noise_pred - predicted["uncond"])
    return noise_pred


def show_clean(
    pipe: Any, attention: CausalAttention, x: Tensor, context_noise: float, cond: Tensor, uncond: Tensor | None
) -> None:
    """One forward of a clean chunk [B, C, c, h, w] in each branch, for its K/V."""
    attention.kv.finished = True
    inputs: dict[str, Any] = {"hidden_states": x.to(cond.dtype), "timestep": x.new_full((len(x),), context_noise)}
    inputs |= {"attention_kwargs": pipe.attention_kwargs, "return_dict": False}
    for branch, text in texts_of(pipe, cond, uncond).items():
        attention.branch = branch
        # Past a residual cache, which would skip blocks, and so their K/V.
        nn.Module.__call__(pipe.transformer, encoder_hidden_states=text, **inputs)


def texts_of(pipe: Any, cond: Tensor, uncond: Tensor | None) -> dict[str, Tensor]:
    """The text [B, L, D] of each branch that is computed."""
    return {"cond": cond} | ({"uncond": uncond} if pipe.do_classifier_free_guidance and uncond is not None else {})
