"""What a run's segments reuse of each other, from numbers alone: no pipeline, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edit_ray.cache.policies import WarmstartReuse
from edit_ray.engine.options import SamplingOptions
from edit_ray.tiers.reuse_plan import ReusePlan, make_reuse_plan
from edit_ray.tiers.slots import slot_bytes


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
    tokens = (
        ((sampling.num_frames - 1) // scale_factor_temporal + 1)
        // frames
        * (sampling.height // scale_factor_spatial // rows)
        * (sampling.width // scale_factor_spatial // columns)
    )
    return 1, tokens, width


def branches_of(sampling: SamplingOptions) -> tuple[str, ...]:
    """The branches of a step, in the order in which it runs them."""
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
    """The reuse plan of a run whose residuals have `size` bytes each.

    Args:
        run_id: The run's id.
        num_segments: How many segments it makes.
        window: Its reuse window.
        policy: What reuses.
        sampling: Of its segments.
        experts: The expert of each step of the loop.
        num_units: Of each expert.
        size: Bytes of one residual.
        budget: Bytes of the tier that holds all that is alive; what does not fit is computed by every segment.
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
