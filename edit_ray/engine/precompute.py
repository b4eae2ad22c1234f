"""What of a denoising loop is known before it, so that the loop itself never waits for the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from edit_ray.engine.fast_transformer import FastTransformer, can_be_fast
from edit_ray.engine.hoist import Hoisted, can_hoist, version_of
from edit_ray.engine.noise_steps import UniPCPlan, plan_noise_steps
from edit_ray.engine.options import Mode

logger = logging.getLogger(__name__)


class LoopTimesteps:
    """The timesteps and sigmas of a loop on the CPU; read again where a callback has changed them or the scheduler."""

    def __init__(self, timesteps: Tensor) -> None:
        self._timesteps, self._on_cpu = timesteps, timesteps
        self._version: int | None = None
        self._sigmas: list[float] = []
        self._read_from: tuple[int, int | None] | None = None
        self._kept: Tensor | None = None  # so that no other tensor gets its id

    def timestep(self, step: int) -> Tensor:
        """The timestep [] of a step, on the CPU."""
        version = version_of(self._timesteps)
        if version is None or version != self._version:
            self._on_cpu, self._version = self._timesteps.cpu(), version
        return self._on_cpu[step]

    def sigma(self, scheduler: Any, index: int) -> float:
        """The scheduler's sigma of this index."""
        sigmas: Tensor = scheduler.sigmas
        version = version_of(sigmas)
        if self._read_from is None or version is None or self._read_from != (id(sigmas), version):
            self._sigmas, self._read_from, self._kept = sigmas.tolist(), (id(sigmas), version), sigmas
        return self._sigmas[index]


class Precompute:
    """Makes what is constant over a loop's steps, and keeps for the next loop what will be the same there."""

    def __init__(self) -> None:
        self._hoisted: dict[str, Hoisted] = {}
        self._noise_steps: UniPCPlan | None = None
        self._fast: dict[str, FastTransformer] = {}
        self._told_of: set[str] = set()  # transformers that the mode fast leaves to diffusers
        self.mode: Mode = "exact"
        self.fp8 = False

    @contextmanager
    def loop(self, pipe: Any, latents: Tensor, text: Tensor) -> Iterator[LoopTimesteps]:
        """Surrounds one loop over `latents` [B, …] with a prompt's `text` [B, L, D], once the steps are set."""
        schedule = LoopTimesteps(pipe.scheduler.timesteps)
        with ExitStack() as stack:
            fast = self._fast_transformers(pipe, latents.device)
            self._hoisted = {} if torch.is_inference_mode_enabled() else self._choose(pipe)
            self._noise_steps = plan_noise_steps(pipe.scheduler, latents.device, self._noise_steps)
            if self._noise_steps is not None:
                stack.enter_context(self._noise_steps.installed(pipe.scheduler))
            for hoisted in self._hoisted.values():
                stack.enter_context(hoisted.installed())
            for transformer in fast:
                stack.enter_context(transformer.installed())
            if not pipe.config.expand_timesteps:
                self._embed_times(pipe, latents, text)
            yield schedule

    def refresh(self) -> None:
        """Look whether a callback has changed a transformer's weights."""
        for hoisted in self._hoisted.values():
            hoisted.refresh()

    def _fast_transformers(self, pipe: Any, device: torch.device) -> list[FastTransformer]:
        """What stands in for blocks in the mode `fast`, which is exact on a CPU."""
        if self.mode == "exact" or device.type != "cuda":
            self._fast.clear()
            return []
        found = {name: transformer for name, transformer in _transformers(pipe).items() if transformer is not None}
        plain = {name: transformer for name, transformer in found.items() if can_be_fast(transformer)}
        for name in found.keys() - plain.keys() - self._told_of:
            self._told_of.add(name)
            logger.warning(
                "%s is not as diffusers loads it (adapters, hooks, image conditions, fused or compiled layers): "
                "the mode fast leaves it to diffusers.",
                name,
            )
        known = self._fast
        self._fast = {
            name: known[name]
            if name in known and known[name].transformer is transformer and known[name].fp8 == self.fp8
            else FastTransformer(transformer, fp8=self.fp8)
            for name, transformer in plain.items()
        }
        return list(self._fast.values())

    def _choose(self, pipe: Any) -> dict[str, Hoisted]:
        found = _transformers(pipe)
        kept = {name: hoisted for name, hoisted in self._hoisted.items() if hoisted.transformer is found[name]}
        return {
            name: kept.get(name) or Hoisted(transformer)
            for name, transformer in found.items()
            if transformer is not None and can_hoist(transformer)
        }

    def _embed_times(self, pipe: Any, latents: Tensor, text: Tensor) -> None:
        timesteps = pipe.scheduler.timesteps
        for hoisted in self._hoisted.values():
            on = next(hoisted.transformer.condition_embedder.parameters()).device
            if on == latents.device == timesteps.device:  # an offloaded one comes in its first forward
                hoisted.embed_times([t.expand(len(latents)) for t in timesteps], timesteps.tolist(), text)


def _transformers(pipe: Any) -> dict[str, Any]:
    """All that a loop calls, those of `cfg_parallel` as well."""
    names = ("transformer", "transformer_2")
    copies = {} if pipe.cfg_parallel is None else pipe.cfg_parallel.transformers
    return {name: getattr(pipe, name, None) for name in names} | {f"{name}, uncond": copies.get(name) for name in names}
