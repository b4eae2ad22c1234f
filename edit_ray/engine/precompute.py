"""What a denoising loop needs that is constant over its steps, computed before it: the loop never waits for the device.

That is RoPE, the text projections, the time embeddings, the noise scheduler's coefficients, and in the mode `fast` the
layout of the blocks' weights. Embeddings come from the transformer's own modules, called as the loop would call them,
so every bit stays the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from edit_ray.engine.caching import experts_of
from edit_ray.engine.fast_transformer import FastTransformer, can_be_fast, is_unmodified, version_of
from edit_ray.engine.noise_steps import UniPCPlan, plan_noise_steps
from edit_ray.engine.options import Mode

logger = logging.getLogger(__name__)
KEPT_TEXTS = 4  # both branches, and the two that a callback may have replaced

Key = tuple[object, ...]


class LoopTimesteps:
    """The timesteps and sigmas of one loop on the CPU, read again if a callback changed them or the scheduler."""

    def __init__(self, timesteps: Tensor) -> None:
        self._timesteps = timesteps
        self._read: dict[str, tuple[Tensor, int | None, Tensor]] = {}  # source, its version, copy

    def timestep(self, step: int) -> Tensor:
        """The timestep [] of a step, on the CPU."""
        return self._on_cpu("timesteps", self._timesteps)[step]

    def sigma(self, scheduler: Any, index: int) -> float:
        """The scheduler's sigma of this index."""
        return float(self._on_cpu("sigmas", scheduler.sigmas)[index])

    def _on_cpu(self, name: str, source: Tensor) -> Tensor:
        version, known = version_of(source), self._read.get(name)
        if known is None or known[0] is not source or version is None or known[1] != version:
            known = self._read[name] = (source, version, source.cpu())
        return known[2]


class Precompute:
    """Computes what is constant over a loop's steps, and keeps for the next loop what is constant over loops."""

    def __init__(self) -> None:
        self.mode: Mode = "exact"
        self.fp8 = False
        self._conditions: dict[str, Conditions] = {}
        self._noise_steps: UniPCPlan | None = None
        self._fast: dict[str, FastTransformer] = {}
        self._warned: set[str] = set()  # transformers that the mode fast leaves to diffusers

    @contextmanager
    def loop(self, pipe: Any, latents: Tensor, text: Tensor) -> Iterator[LoopTimesteps]:
        """Surrounds one loop over `latents` [B, …] with a prompt's `text` [B, L, D], once the steps are set."""
        transformers = _transformers(pipe)
        with ExitStack() as stack:
            self._choose_fast(transformers, latents.device, pipe.block_offload is not None)
            self._choose_conditions(transformers)
            self._noise_steps = plan_noise_steps(pipe.scheduler, latents.device, self._noise_steps)
            if self._noise_steps is not None:
                stack.enter_context(self._noise_steps.installed(pipe.scheduler))
            for conditions in self._conditions.values():
                stack.enter_context(conditions.installed())
            for fast in self._fast.values():
                stack.enter_context(fast.installed())
            if not pipe.config.expand_timesteps:
                self._embed_times(pipe.scheduler.timesteps, latents, text)
            yield LoopTimesteps(pipe.scheduler.timesteps)

    def refresh(self) -> None:
        """Drop what was computed with weights that a callback has changed."""
        for conditions in self._conditions.values():
            conditions.refresh()

    def _choose_fast(self, transformers: Mapping[str, Any], device: torch.device, offloaded: bool) -> None:
        """Replace the blocks of unmodified transformers in the mode `fast`, which is exact on a CPU."""
        known, self._fast = self._fast, {}
        if self.mode == "exact" or device.type != "cuda":
            return
        for name, transformer in transformers.items():
            if can_be_fast(transformer, offloaded=offloaded) and not (offloaded and self.fp8):
                fast = known.get(name)
                wanted = (transformer, self.fp8, offloaded)
                if fast is None or (fast.transformer, fast.fp8, fast.offloaded) != wanted:
                    fast = FastTransformer(transformer, fp8=self.fp8, offloaded=offloaded)
                self._fast[name] = fast
            elif name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "%s is not as diffusers loads it (adapters, hooks, fused, quantised or compiled layers), or its "
                    "blocks are offloaded and would compute in 8 bits: the mode fast leaves it to diffusers.",
                    name,
                )

    def _choose_conditions(self, transformers: Mapping[str, Any]) -> None:
        known, self._conditions = self._conditions, {}
        if torch.is_inference_mode_enabled():
            return
        for name, transformer in transformers.items():
            if can_precompute(transformer):
                kept = known.get(name)
                same = kept is not None and kept.transformer is transformer
                self._conditions[name] = kept if kept and same else Conditions(transformer)

    def _embed_times(self, timesteps: Tensor, latents: Tensor, text: Tensor) -> None:
        for conditions in self._conditions.values():
            on = next(conditions.transformer.condition_embedder.parameters()).device
            if on == latents.device == timesteps.device:  # an offloaded embedder arrives with its first forward
                conditions.embed_times([t.expand(len(latents)) for t in timesteps], timesteps.tolist(), text)


class Conditions:
    """Replaces the forwards of one transformer's `rope` and `condition_embedder` while a loop runs.

    A value is looked up by the address, shape and version of the tensor it was computed from. That tensor is kept
    alive, so its address is not used again. Changes of weights and modules are found by `refresh`.
    """

    def __init__(self, transformer: WanTransformer3DModel | WanVACETransformer3DModel) -> None:
        self.transformer = transformer
        self._rope_module, self._embedder = transformer.rope, transformer.condition_embedder
        self._rope, self._embed = self._rope_module.forward, self._embedder.forward
        self._plain = True
        self._weights: object = None
        self._schedule: object = None
        self._ropes: dict[Key, tuple[Tensor, Tensor]] = {}
        self._texts: dict[Key, tuple[Tensor, Tensor | None, Tensor, Tensor | None]] = {}  # text, image; both projected
        self._times: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}  # timestep, temb, timestep_proj

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the transformer's forwards use the stored values."""
        self.refresh()
        self._rope_module.forward, self._embedder.forward = self._rope_of, self._conditions_of
        try:
            yield
        finally:
            del self._rope_module.forward, self._embedder.forward
            self._texts.clear()
            if self._schedule is None:
                self._times.clear()

    def refresh(self) -> None:
        """Drop every value if the weights are no longer those it was computed with."""
        embedder = self._embedder
        self._plain = all(is_unmodified(each, replaced=each is embedder) for each in embedder.modules())
        parameters = [*self._embedder.parameters(), *self._rope_module.buffers()]
        weights = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
        if weights != self._weights:
            self._weights, self._schedule = weights, None
            for known in (self._ropes, self._texts, self._times):
                known.clear()

    def embed_times(self, timesteps: Sequence[Tensor], values: Sequence[float], text: Tensor) -> None:
        """Embed the timesteps [B] of all steps, one by one as in the loop, unless the last loop had the same.

        `text` is a prompt's embedding, whose type the embeddings take.
        """
        schedule = (tuple(values), timesteps[0].dtype, timesteps[0].shape, timesteps[0].device, text.dtype)
        if schedule == self._schedule and len(self._times) == len(timesteps):
            made = [(temb, projected) for _, temb, projected in self._times.values()]
        else:
            made = [self._embed(timestep, text[:, :1])[:2] for timestep in timesteps]
        self._schedule = schedule
        self._times = {
            _key(timestep, text.dtype): (timestep, temb, projected)
            for timestep, (temb, projected) in zip(timesteps, made, strict=True)
        }

    def _rope_of(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        key = (hidden_states.shape[2:], hidden_states.device)
        if key not in self._ropes:
            self._ropes = {key: self._rope(hidden_states)}
        return self._ropes[key]

    def _conditions_of(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        text, image = encoder_hidden_states, encoder_hidden_states_image
        if not self._plain or timestep.is_inference() or text.is_inference():
            return self._embed(timestep, text, image, timestep_seq_len)  # type: ignore[no-any-return]
        time_key, text_key = _key(timestep, text.dtype), _key(text, *([] if image is None else _key(image)))
        time, known = self._times.get(time_key), self._texts.get(text_key)
        if time is None or known is None:
            shown = (text, image) if known is None else (text[:, :1], None)
            temb, timestep_proj, *projected = self._embed(timestep, *shown, timestep_seq_len)
            if time is None:
                time = (timestep, temb, timestep_proj)
                if self._schedule is None:  # embeddings of each token are large: only the branches of a step share them
                    self._times = {time_key: time}
            if known is None:
                known = self._texts[text_key] = (text, image, *projected)
                if len(self._texts) > KEPT_TEXTS:
                    del self._texts[next(iter(self._texts))]
        return time[1], time[2], known[2], known[3]


def can_precompute(transformer: nn.Module) -> bool:
    """Whether a transformer embeds its conditions with unmodified modules.

    Adapters (LoRA) and offloading change what a module computes without a change of its weights.
    """
    if not isinstance(transformer, WanTransformer3DModel | WanVACETransformer3DModel):
        return False
    if transformer._compiled_call_impl is not None:
        return False
    return all(
        is_unmodified(module)
        for part in (transformer.rope, transformer.condition_embedder)
        for module in part.modules()
    )


def _key(tensor: Tensor, *more: object) -> Key:
    return (tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, *more)


def _transformers(pipe: Any) -> dict[str, Any]:
    """Every transformer that a loop calls, with the copies of `cfg_parallel`."""
    copies = {} if pipe.cfg_parallel is None else pipe.cfg_parallel.transformers
    return experts_of(pipe) | {f"{name}, uncond": copy for name, copy in copies.items()}
