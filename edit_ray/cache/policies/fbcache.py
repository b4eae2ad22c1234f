"""First-Block-Cache: skip the other blocks while the first block's residual is close to that of the last computed step.

Source: Cheng Zeyi's github.com/chengzeyi/ParaAttention; the rule is that of diffusers' `hooks/first_block_cache.py`.
"""

from __future__ import annotations

from pydantic import Field

from edit_ray.cache.policies.estimates import relative_l1
from edit_ray.cache.policies.option_types import Number, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy


@register_policy("fbcache")
@with_options
class FirstBlockCache(CachePolicy):
    """Skips while the first block's residual is within a relative distance of that of the last computed step.

    That residual [B, N, D] is kept per unit and branch, outside the store.
    """

    granularities = ("stack", "groups")
    needs_first_block_probe = True
    kept_hidden = 1

    rel_l1_thresh: Number = Field(
        default=0.1, description="Skip up to this distance, mean|r - r'| / mean|r'|; 0 or below never skips."
    )

    def most_skips(self, num_steps: int) -> int:
        return num_steps - 1 if self.rel_l1_thresh > 0 else 0

    def reset(self, state: UnitState) -> None:
        state.user["reference"] = None

    def should_compute(self, ctx: PolicyContext) -> bool:
        reference = ctx.state.user["reference"]
        ctx.threshold = self.rel_l1_thresh
        if reference is None or self.rel_l1_thresh <= 0:
            return True
        assert ctx.first_block_residual is not None
        ctx.signal = relative_l1(ctx.first_block_residual, reference)
        return not ctx.signal <= self.rel_l1_thresh  # NaN computes

    def warm(self, ctx: PolicyContext) -> None:
        """Nothing: the distance is measured from computed steps only."""

    def on_computed(self, ctx: PolicyContext) -> None:
        ctx.state.user["reference"] = ctx.first_block_residual
