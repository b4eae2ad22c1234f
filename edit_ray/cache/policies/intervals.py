"""The steps at which TaylorSeer and the forecasters after it compute: the first ones, then one in an interval."""

from __future__ import annotations

from pydantic import Field

from edit_ray.cache.policies.option_types import Count, Whole, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState


@with_options
class AtIntervals(CachePolicy):
    """Computes the first steps of a loop, and one step in an interval after them: the base of forecasting policies.

    The steps are those of diffusers' `hooks/taylorseer_cache.py`.
    """

    timestep_only = True

    cache_interval: Whole = Field(
        default=5, description="Steps from one computed step to the next; 1 or below never skips."
    )
    disable_cache_before_step: Count = Field(default=3, description="Every step before this one computes.")
    disable_cache_after_step: Count | None = Field(
        default=None, description="Every step from this one on computes; None for no such step."
    )

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

    def most_stored(self, num_steps: int) -> int:
        return min(self.history_len, num_steps - self.most_skips(num_steps))

    def reset(self, state: UnitState) -> None:
        state.user["begun"] = False

    def should_compute(self, ctx: PolicyContext) -> bool:
        """A unit's first step computes: there is nothing to forecast from."""
        begun, ctx.state.user["begun"] = ctx.state.user["begun"], True
        return not begun or self.computes(ctx.step)
