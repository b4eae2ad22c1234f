"""TaylorSeer: compute every few steps, and forecast the residual between them by a Taylor expansion.

Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers"; the steps that
compute are those of diffusers' `hooks/taylorseer_cache.py`, which forecasts the output of each attention instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edit_ray.cache.policies.estimates import add_forecast
from edit_ray.cache.policies.option_types import Count, Whole, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy("taylorseer")
@with_options
class TaylorSeer(CachePolicy):
    """Forecasts a unit's residual from those of its last `max_order` + 1 computed steps."""

    timestep_only = True

    cache_interval: Whole = Field(
        default=5, description="Steps from one computed step to the next; 1 or below never skips."
    )
    disable_cache_before_step: Count = Field(default=3, description="Every step before this one computes.")
    disable_cache_after_step: Count | None = Field(
        default=None, description="Every step from this one on computes; None for no such step."
    )
    max_order: Count = Field(default=1, description="Of the expansion; 0 reuses the last residual as it is.")

    def __post_init__(self) -> None:
        self.history_len = self.max_order + 1

    def computes(self, step: int) -> bool:
        """Whether the rule computes step s: s - `disable_cache_before_step` - 1 is a multiple of `cache_interval`."""
        after = self.disable_cache_after_step
        return (
            self.cache_interval <= 1
            or step < self.disable_cache_before_step
            or (step - self.disable_cache_before_step - 1) % self.cache_interval == 0
            or (after is not None and step >= after)
        )

    def most_skips(self, num_steps: int) -> int:
        return sum(not self.computes(step) for step in range(1, num_steps))

    def reset(self, state: UnitState) -> None:
        state.user["begun"] = False

    def should_compute(self, ctx: PolicyContext) -> bool:
        """A unit's first step computes: there is nothing to forecast from."""
        begun, ctx.state.user["begun"] = ctx.state.user["begun"], True
        return not begun or self.computes(ctx.step)

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        return add_forecast(ctx, self.max_order)
