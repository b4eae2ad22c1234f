"""The cache of a pipeline: turned on and off, and told of the loop's steps before they are made."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from diffusers import WanPipeline
from torch import Tensor

from edit_ray.cache.controller import Cache
from edit_ray.cache.install import apply_cache_on_transformer
from edit_ray.cache.plan import LoopStep
from edit_ray.cache.policies import CachePolicy, make_policy
from edit_ray.cache.stores.store import CacheStore
from edit_ray.engine.calibration import calibrated_options
from edit_ray.engine.targets import THRESHOLD_OF, check_target, option_for


class CacheControl:
    """`enable_cache`, `disable_cache` and `cache` for a pipeline of diffusers' components."""

    _cache: Cache | None = None

    @property
    def cache(self) -> Cache | None:
        """The enabled cache, to see and to edit, or None."""
        return self._cache if self._cache is not None and self._cache.experts else None

    def enable_cache(
        self,
        policy: str | CachePolicy = "teacache",
        num_inference_steps: int = 50,
        granularity: str | int = "stack",
        store: CacheStore | None = None,
        history_len: int | None = None,
        target_speedup: float | None = None,
        **policy_kwargs: Any,
    ) -> Cache:
        """Skip what a policy says need not be computed again, in all later calls.

        Arguments and errors are those of `edit_ray.cache.apply_cache_on_transformer`. What a policy has to know of the
        model is taken from the model's own calibration, if it has one, unless it is given. `target_speedup`, of 2 say,
        chooses the threshold at which half of the forwards are computed, for policies whose mask is known beforehand.
        """
        if self.cache is not None:
            raise ValueError("A cache is enabled already; call disable_cache() first.")
        pipe: Any = self
        if isinstance(policy, str):
            name = pipe.config.get("_name_or_path")
            policy_kwargs = calibrated_options(Path(name) if name else None, policy, policy_kwargs)
            if target_speedup is not None:
                option, value = self._threshold(policy, num_inference_steps, target_speedup, policy_kwargs)
                policy_kwargs[option] = value
        elif target_speedup is not None:
            raise ValueError("target_speedup needs the name of a policy, whose threshold it then chooses.")
        names = ("transformer", "transformer_2")
        experts = {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}
        self._cache = apply_cache_on_transformer(
            experts,
            policy,
            num_inference_steps,
            granularity,
            store,
            history_len,
            lambda: _steps_ahead(pipe, num_inference_steps),
            None if pipe.cfg_parallel is None else pipe.cfg_parallel.transformers,
            **policy_kwargs,
        )
        return self._cache

    def _threshold(
        self, policy: str, num_inference_steps: int, target_speedup: float, options: dict[str, Any]
    ) -> tuple[str, Any]:
        """The option and the value that make a policy compute one forward in `target_speedup`."""
        check_target(policy, make_policy(policy, options), options)
        option = THRESHOLD_OF[policy]

        def computed_share(threshold: Any) -> float:
            try:
                tried: dict[str, Any] = {**options, option: threshold}
                cache = self.enable_cache(policy, num_inference_steps, **tried)
                masks = (cache.plan() or {}).values()
            finally:
                self.disable_cache()
            decisions = [compute for mask in masks for compute in mask if compute is not None]
            return sum(decisions) / len(decisions)

        return option, option_for(option, target_speedup, computed_share)

    def disable_cache(self) -> None:
        """Compute everything again; without a cache, nothing happens."""
        if self._cache is not None:
            self._cache.remove()
        self._cache = None

    def cached_call(self, reset_cache: bool, prefetch_reuse: bool) -> AbstractContextManager[None]:
        """What surrounds one denoising loop, once the scheduler's steps are set."""
        pipe: Any = self
        if self.cache is None:
            return nullcontext()
        if prefetch_reuse:
            self.cache.prefetch_reuse()
        branches = ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)
        return self.cache.call(loop_steps(self, pipe.scheduler), branches=branches, clear_store=reset_cache)


def loop_steps(pipe: Any, scheduler: Any) -> list[LoopStep]:
    """What is known of a loop before it: the expert, timestep and sigma of each step of a scheduler that is set."""
    return [LoopStep(expert_name(pipe, t), t, float(scheduler.sigmas[i])) for i, t in enumerate(scheduler.timesteps)]


def expert_name(pipe: WanPipeline, t: Tensor) -> str:
    """Which transformer denoises at timestep `t`: "transformer" from the boundary upwards, "transformer_2" below it."""
    boundary = pipe.config.boundary_ratio
    high = boundary is None or t >= boundary * pipe.scheduler.config.num_train_timesteps
    return "transformer" if high else "transformer_2"


def _steps_ahead(pipe: Any, num_inference_steps: int) -> list[LoopStep]:
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return loop_steps(pipe, scheduler)
