"""What a run's segments may reuse of each other: the shape of its residuals, and the plan of their writes and reads.

Importing this loads no torch: `edit-ray plan` makes the same plan from a model's JSON files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edit_ray.cache.policies import WarmstartReuse
from edit_ray.engine.options import SamplingOptions
from edit_ray.tiers.reuse_plan import ReusePlan, make_reuse_plan
from edit_ray.tiers.slots import slot_bytes

if TYPE_CHECKING:
    from edit_ray.tiers.leases import Reuse
    from edit_ray.tiers.protocol import EntryForm


def plan_run_reuse(
    pipe: Any, run_id: str, num_segments: int, window: int, sampling: SamplingOptions, budget: int | None
) -> Reuse:
    """The reuse plan of a run with the cache that is enabled on `pipe`, whose policy must be `warmstart_reuse`."""
    from edit_ray.engine.conditioning import StepSchedule
    from edit_ray.tiers.leases import Reuse

    schedule = StepSchedule(sampling.num_inference_steps, sampling.sigmas)
    policy, form = pipe.cache.policy, residual_form(pipe, sampling)
    assert isinstance(policy, WarmstartReuse)
    plan = plan_from_numbers(
        run_id,
        num_segments,
        window,
        policy,
        sampling,
        experts=[step.expert for step in pipe.planned_steps(schedule)],
        num_units={name: len(expert.units) for name, expert in pipe.cache.experts.items()},
        size=form.size,
        budget=budget,
    )
    return Reuse(plan, form)


def residual_form(pipe: Any, sampling: SamplingOptions) -> EntryForm:
    """A residual is [1, tokens, width] in the transformer's type."""
    from edit_ray.tiers.protocol import EntryForm

    config = pipe.transformer.config
    shape = residual_shape(
        sampling,
        patch_size=config.patch_size,
        scale_factor_temporal=pipe.vae_scale_factor_temporal,
        scale_factor_spatial=pipe.vae_scale_factor_spatial,
        width=config.num_attention_heads * config.attention_head_dim,
    )
    return EntryForm(pipe.transformer.device, pipe.transformer.dtype, shape)


def residual_shape(
    sampling: SamplingOptions,
    *,
    patch_size: tuple[int, int, int],
    scale_factor_temporal: int,
    scale_factor_spatial: int,
    width: int,
) -> tuple[int, int, int]:
    """A residual is [1, tokens, width], whatever its unit."""
    frames, rows, columns = patch_size
    latent_frames = (sampling.num_frames - 1) // scale_factor_temporal + 1
    height, width_of_row = sampling.height // scale_factor_spatial, sampling.width // scale_factor_spatial
    return 1, latent_frames // frames * (height // rows) * (width_of_row // columns), width


def branches_of(sampling: SamplingOptions) -> tuple[str, ...]:
    """The branches of a step, in the order of the loop."""
    return ("cond", "uncond") if sampling.guidance_scale > 1 else ("cond",)


def plan_from_numbers(
    run_id: str,
    num_segments: int,
    window: int,
    policy: WarmstartReuse,
    sampling: SamplingOptions,
    *,
    experts: Sequence[str],
    num_units: Mapping[str, int],
    size: int,
    budget: int | None,
) -> ReusePlan:
    """The reuse plan of a run with a reuse window, whose residuals have `size` bytes each.

    `experts` has the expert of each step, `num_units` the units of each expert. `budget` bounds the bytes of the tier
    that holds every live entry; every segment computes the residuals beyond it.
    """
    return make_reuse_plan(
        run_id,
        num_segments,
        window=window,
        warm_steps=policy.warm_steps,
        experts=experts,
        unit_bytes={expert: [size] * units for expert, units in num_units.items()},
        branches=branches_of(sampling),
        # A tier counts slots, which are whole pages; the plan counts bytes.
        budget=None if budget is None else budget // slot_bytes(size) * size,
    )
