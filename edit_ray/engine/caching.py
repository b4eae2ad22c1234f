"""The cache of a pipeline: enabled, disabled, and given the loop's steps before they run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from diffusers import WanPipeline
from torch import Tensor

from edit_ray.cache.blocks import check_not_compiled
from edit_ray.cache.cache import Cache
from edit_ray.cache.install import apply_cache_on_transformer, cache_on
from edit_ray.cache.loop_position import LoopStep
from edit_ray.cache.policies import CachePolicy, make_policy
from edit_ray.cache.stores.base import CacheStore
from edit_ray.engine.calibration import FILE_NAME, THRESHOLD_OF, calibrated_options, check_target, threshold_for
from edit_ray.engine.conditioning import StepSchedule


class CacheControl:
    """`enable_cache`, `disable_cache` and `cache` for a pipeline of diffusers' components."""

    lora_digest: str | None
    _cache: Cache | None = None
    _target_steps: int | None = None  # of the loop that target_speedup has chosen a threshold for

    @property
    def cache(self) -> Cache | None:
        """The cache that was enabled here or came with the transformers, to see and to edit; None without one."""
        if self._cache is not None and self._cache.experts:
            return self._cache
        return next((cache for expert in experts_of(self).values() if (cache := cache_on(expert)) is not None), None)

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, whose transformers have no cache."""
        return {**self.__dict__, "_cache": None}

    @property
    def calibration(self) -> Path | None:
        """The calibration file in the model's folder; None without one."""
        return self.file_of_model(FILE_NAME)

    def file_of_model(self, name: str) -> Path | None:
        """The file of this name in the model's folder; None without one.

        The folder is that of the transformer, loaded alone or with its pipeline, else the pipeline's.
        """
        loaded_from = [expert.config.get("_name_or_path") for expert in experts_of(self).values()]
        folders = [folder for place in loaded_from if place for folder in (Path(place), Path(place).parent)]
        of_pipe = getattr(self, "config", {}).get("_name_or_path")
        folders += [Path(of_pipe)] if of_pipe else []
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    def enable_cache(
        self,
        policy: str | CachePolicy = "teacache",
        num_inference_steps: int = 50,
        granularity: str | int = "stack",
        store: CacheStore | None = None,
        history_len: int | None = None,
        target_speedup: float | None = None,
        sigmas: Sequence[float] | None = None,
        cfg_gate: float | None = None,
        **policy_kwargs: Any,
    ) -> Cache:
        """Skip, in all later calls, what a policy says need not be computed again.

        Args:
            policy: "always", "teacache", "magcache", "taylorseer", "spectrum", "foca", "dmd", "ranked", "lemica",
                "schedule", "fbcache", "dicache", "seacache", "easycache", "warmstart_reuse" (docs/caching.md), another
                registered name, or a `CachePolicy`.
            num_inference_steps: That of the calls. A call with another number is followed if the policy can serve it;
                a mask, ranks or a `target_speedup` are for one number.
            granularity: What one decision covers: "stack", "per_block", or the number of blocks in a group.
            store: Where residuals are stored; on the device unless given.
            history_len: How many computed residuals of a unit are stored, at least as many as the policy reads.
            target_speedup: 2, say, chooses the threshold of a known mask, at which half of the forwards compute.
            sigmas: Those of the calls, in place of `num_inference_steps`.
            cfg_gate: 0.5, say: after half of the steps "uncond" is "cond" minus their last difference of this expert.
            policy_kwargs: The policy's own options. What it needs to know of the model comes from the model's
                calibration, if there is one, unless it is given.

        Raises:
            ValueError, TypeError: as `edit_ray.cache.apply_cache_on_transformer`; a cache is enabled already.
        """
        if self.cache is not None:
            raise ValueError("A cache is enabled already; call disable_cache() first.")
        pipe: Any = self
        schedule = StepSchedule(num_inference_steps if sigmas is None else len(sigmas), sigmas)
        self._target_steps = None
        if isinstance(policy, str):
            folder = None if self.calibration is None else self.calibration.parent
            policy_kwargs = calibrated_options(folder, policy, policy_kwargs, self.lora_digest)
            if target_speedup is not None:
                option, value = self._threshold(policy, schedule, target_speedup, policy_kwargs, cfg_gate)
                policy_kwargs[option] = value
        elif target_speedup is not None:
            raise ValueError("target_speedup needs the name of a policy, whose threshold it then chooses.")
        num_steps = len(self.planned_steps(schedule))
        cache = self._cache = apply_cache_on_transformer(
            experts_of(self),
            policy,
            num_steps,
            granularity,
            store,
            history_len,
            lambda: self.planned_steps(schedule),
            None if pipe.cfg_parallel is None else pipe.cfg_parallel.transformers,
            cfg_gate,
            **policy_kwargs,
        )
        self._target_steps = None if target_speedup is None else num_steps
        return cache

    def _threshold(
        self,
        policy: str,
        schedule: StepSchedule,
        target_speedup: float,
        options: dict[str, Any],
        cfg_gate: float | None,
    ) -> tuple[str, Any]:
        """The option and its value at which a policy computes one forward in `target_speedup`."""
        check_target(policy, make_policy(policy, options), options)
        option = THRESHOLD_OF[policy]

        def computed_share(threshold: Any) -> float:
            try:
                tried: dict[str, Any] = {**options, option: threshold, "cfg_gate": cfg_gate}
                cache = self.enable_cache(policy, schedule.num_inference_steps, sigmas=schedule.sigmas, **tried)
                masks = (cache.plan() or {}).values()
            finally:
                self.disable_cache()
            decisions = [compute for mask in masks for compute in mask if compute is not None]
            return sum(decisions) / len(decisions)

        return option, threshold_for(option, target_speedup, computed_share)

    @property
    def has_target_speedup(self) -> bool:
        """Whether a cache is enabled whose threshold was chosen for a speedup, with the weights of that moment."""
        return self.cache is not None and self._target_steps is not None

    def planned_steps(self, schedule: StepSchedule) -> list[LoopStep]:
        """The steps of a loop with this schedule; the pipeline's scheduler stays as it is."""
        pipe: Any = self
        scheduler = copy.deepcopy(pipe.scheduler)
        schedule.set_on(scheduler)
        return loop_steps(pipe, scheduler)

    def disable_cache(self) -> None:
        """Compute everything again; without a cache, nothing happens."""
        if self.cache is not None:
            self.cache.remove()
        self._cache = None

    def cached_call(self, reset_cache: bool, prefetch_reuse: bool, begin: int = 0) -> AbstractContextManager[None]:
        """Surrounds one denoising loop from the scheduler's timestep `begin`, once its steps are set."""
        pipe: Any = self
        if self.cache is None:
            return nullcontext()
        for expert in experts_of(self).values():
            check_not_compiled(expert)
        steps = loop_steps(self, pipe.scheduler)[begin:]
        if self._target_steps not in (None, len(steps)):
            raise ValueError(
                f"The cache's target_speedup was reached for a loop of {self._target_steps} steps, and this one has "
                f"{len(steps)}: call disable_cache(), then enable_cache() with the call's num_inference_steps."
            )
        if prefetch_reuse:
            self.cache.prefetch_reuse()
        branches = ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)
        return self.cache.call(steps, branches=branches, clear_store=reset_cache)


def experts_of(pipe: Any) -> dict[str, Any]:
    """The transformers that a pipeline has, by name."""
    found = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: transformer for name, transformer in found.items() if transformer is not None}


def loop_steps(pipe: Any, scheduler: Any) -> list[LoopStep]:
    """The expert, timestep and sigma of each step of a scheduler whose timesteps are set."""
    return [LoopStep(expert_name(pipe, t), t, float(scheduler.sigmas[i])) for i, t in enumerate(scheduler.timesteps)]


def expert_name(pipe: WanPipeline, t: Tensor) -> str:
    """Which transformer denoises at timestep `t`: "transformer" from the boundary upwards, "transformer_2" below it."""
    boundary = pipe.config.boundary_ratio
    high = boundary is None or t >= boundary * pipe.scheduler.config.num_train_timesteps
    return "transformer" if high else "transformer_2"
