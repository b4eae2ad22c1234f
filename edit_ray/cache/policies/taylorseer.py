"""TaylorSeer: compute every few steps, and forecast the residual between them by a Taylor expansion.

Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers"; the steps that
compute are those of diffusers' `hooks/taylorseer_cache.py`, which forecasts the output of each attention instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edit_ray.cache.policies.estimates import add_forecast
from edit_ray.cache.policies.intervals import AtIntervals
from edit_ray.cache.policies.option_types import Count, with_options
from edit_ray.cache.policies.policy import PolicyContext, register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy("taylorseer")
@with_options
class TaylorSeer(AtIntervals):
    """Forecasts a unit's residual from those of its last `max_order` + 1 computed steps."""

    max_order: Count = Field(default=1, description="Of the expansion; 0 reuses the last residual as it is.")

    def __post_init__(self) -> None:
        self.history_len = self.max_order + 1

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        return add_forecast(ctx, self.max_order)
