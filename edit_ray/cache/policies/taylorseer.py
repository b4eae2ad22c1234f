"""TaylorSeer: compute every few steps, and forecast the residual between them by a Taylor expansion.

Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers"; the steps that
compute are those of diffusers' `hooks/taylorseer_cache.py`, where what is forecast is the output of each attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edit_ray.cache.policies.checks import whole
from edit_ray.cache.policies.extrapolation import add_forecast
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy("taylorseer")
class TaylorSeer(CachePolicy):
    """Forecasts a unit's residual from those of its last `max_order` + 1 computed steps."""

    timestep_only = True

    def __init__(
        self,
        *,
        cache_interval: int = 5,
        disable_cache_before_step: int = 3,
        disable_cache_after_step: int | None = None,
        max_order: int = 1,
    ) -> None:
        """Step s computes if s - `disable_cache_before_step` - 1 is a multiple of `cache_interval`.

        Args:
            cache_interval: Steps from one computed step to the next; 1 or below never skips.
            disable_cache_before_step: Every step before this one computes.
            disable_cache_after_step: Every step from this one on computes; None for no such step.
            max_order: Of the expansion; 0 reuses the last residual as it is.
        """
        self.cache_interval = whole("cache_interval", cache_interval, least=None)
        self.disable_cache_before_step = whole("disable_cache_before_step", disable_cache_before_step)
        after = disable_cache_after_step
        self.disable_cache_after_step = None if after is None else whole("disable_cache_after_step", after)
        self.max_order = whole("max_order", max_order)
        self.history_len = self.max_order + 1

    def computes(self, step: int) -> bool:
        """Whether the rule has this step computed."""
        after = self.disable_cache_after_step
        return (
            self.cache_interval <= 1
            or step < self.disable_cache_before_step
            or (step - self.disable_cache_before_step - 1) % self.cache_interval == 0
            or (after is not None and step >= after)
        )

    def reset(self, state: UnitState) -> None:
        """See `CachePolicy`."""
        state.user["begun"] = False

    def should_compute(self, ctx: PolicyContext) -> bool:
        """See `CachePolicy`. A unit's first step computes: nothing can be forecast from nothing."""
        begun, ctx.state.user["begun"] = ctx.state.user["begun"], True
        return not begun or self.computes(ctx.step)

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        """See `CachePolicy`."""
        return add_forecast(ctx, self.max_order)
