"""Explicit masks: a list of the steps that compute, or all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edit_ray.cache.policies.estimates import add_forecast, extrapolate
from edit_ray.cache.policies.option_types import Mask, Order, PerBranch, check_lengths, pick_per_branch, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy("always")
class Always(CachePolicy):
    """The baseline: never skips."""

    timestep_only = True

    def should_compute(self, ctx: PolicyContext) -> bool:
        return True


@register_policy("schedule")
@with_options
class Schedule(CachePolicy):
    """Computes where its mask is True. The mask may differ per branch and expert, not per unit."""

    timestep_only = True

    mask: PerBranch[Mask] = Field(
        description='For each step of the loop whether it computes; or such a sequence per "cond" and "uncond", or per '
        '"transformer/cond" and so on.'
    )
    residual_order: Order = Field(
        default=0, description="0 reuses the last computed residual, 1 extrapolates linearly from the last two."
    )

    def __post_init__(self) -> None:
        self.history_len = self.residual_order + 1

    def check(self, num_steps: int) -> None:
        check_lengths("mask", self.mask, num_steps)

    def should_compute(self, ctx: PolicyContext) -> bool:
        return pick_per_branch("mask", self.mask, ctx.expert, ctx.branch)[ctx.step]

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        return add_forecast(ctx, self.residual_order, extrapolate)
