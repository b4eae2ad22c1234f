"""What a run's segments may reuse of each other: the form of its residuals, and the plan of their writes and reads."""

from __future__ import annotations

from typing import Any

from edit_ray.cache.cache import Cache
from edit_ray.cache.policies import WarmstartReuse
from edit_ray.engine.caching import loop_steps
from edit_ray.engine.options import SamplingOptions
from edit_ray.engine.reuse_numbers import plan_from_numbers, residual_shape
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.protocol import EntryForm


def plan_run_reuse(
    pipe: Any, run_id: str, num_segments: int, window: int, sampling: SamplingOptions, budget: int | None
) -> Reuse:
    """The reuse plan of a run with the cache that is enabled on `pipe`, whose policy must be `warmstart_reuse`.

    `budget` bounds the bytes that are alive at a time; what does not fit is computed by every segment.
    """
    cache: Cache = pipe.cache
    policy = cache.policy
    assert isinstance(policy, WarmstartReuse)
    form = residual_form(pipe, sampling)
    pipe.scheduler.set_timesteps(sampling.num_inference_steps)
    plan = plan_from_numbers(
        run_id,
        num_segments,
        window,
        policy,
        sampling,
        experts=[step.expert for step in loop_steps(pipe, pipe.scheduler)],
        num_units={name: len(expert.units) for name, expert in cache.experts.items()},
        size=form.size,
        budget=budget,
    )
    return Reuse(plan, form)


def residual_form(pipe: Any, sampling: SamplingOptions) -> EntryForm:
    """A residual is [1, tokens, width] in the transformer's type."""
    config = pipe.transformer.config
    shape = residual_shape(
        sampling,
        patch_size=config.patch_size,
        scale_factor_temporal=pipe.vae_scale_factor_temporal,
        scale_factor_spatial=pipe.vae_scale_factor_spatial,
        width=config.num_attention_heads * config.attention_head_dim,
    )
    return EntryForm(pipe.transformer.device, pipe.transformer.dtype, shape)
