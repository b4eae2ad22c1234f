"""DiCache: skip while the first block's output changes little; extrapolate the residual by that block's trend.

Source: J. Bu et al., "DiCache: Let Diffusion Model Determine Its Own Cache" (arXiv 2508.17356); the rule is that of the
authors' script for Wan2.1 with a probe of one block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edit_ray.cache.policies.estimates import accumulate, read_history, relative_l1
from edit_ray.cache.policies.option_types import Number, Share, Whole, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor


def alignment(probe: Tensor, latest: Tensor, before: Tensor) -> Tensor:
    """|probe - before| / |latest - before|, each a mean, clamped to 1 to 2; 1 where both are 0.

    All three are residuals of the probe [B, N, D], the latter two of the last two computed steps. Returns a scalar [].
    """
    moved = (probe - before).abs().float().mean()
    last_moved = (latest - before).abs().float().mean()
    return (moved / last_moved).nan_to_num(nan=1.0).clamp(1, 2)


@register_policy("dicache")
@with_options
class DiCache(CachePolicy):
    """Skips while the relative changes of the probe's output, from step to step, add up to less than a threshold.

    A skipped unit adds R2 + gamma (R1 - R2), its whole residuals at the last computed step (1) and at the one before
    (2), with gamma of `alignment`; R1 alone before the second computed step. A unit that computes continues from the
    probe. Kept per unit and branch, outside the store: the probe's last output and its residuals at those steps,
    [B, N, D] each.
    """

    granularities = ("stack", "groups")
    needs_first_block_probe = True
    kept_hidden = 3
    history_len = 2

    rel_l1_thresh: Number = Field(
        default=0.08, description="Skip while less than this has accumulated; 0 or below never skips."
    )
    probe_depth: Whole = Field(
        default=1,
        ge=1,
        le=1,
        json_schema_extra={"valid": "1, the unit's first block"},
        description="Blocks in the probe.",
    )
    retention_ratio: Share = Field(
        default=0.2, description="Share of the steps, from the first, that always compute (the authors' `ret_ratio`)."
    )

    def most_skips(self, num_steps: int) -> int:
        return num_steps - max(1, int(num_steps * self.retention_ratio)) if self.rel_l1_thresh > 0 else 0

    def reset(self, state: UnitState) -> None:
        state.user.update(previous=None, accumulated=0.0, probes={})

    def should_compute(self, ctx: PolicyContext) -> bool:
        user = ctx.state.user
        previous, user["previous"] = user["previous"], ctx.base
        ctx.threshold = self.rel_l1_thresh
        retained = ctx.step < int(ctx.num_steps * self.retention_ratio)
        if previous is None or retained or self.rel_l1_thresh <= 0:
            return True
        assert ctx.base is not None
        ctx.signal = relative_l1(ctx.base, previous)
        return accumulate(ctx, ctx.signal, self.rel_l1_thresh)

    def warm(self, ctx: PolicyContext) -> None:
        """Update the state as if the step had been computed."""
        ctx.state.user.update(previous=ctx.base, accumulated=0.0)

    def on_computed(self, ctx: PolicyContext) -> None:
        user, computed = ctx.state.user, ctx.state.computed_steps
        user["accumulated"] = 0.0
        probes = user["probes"] | {ctx.step: ctx.first_block_residual}
        user["probes"] = {step: probe for step, probe in probes.items() if step in computed[-2:]}

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        history, probes = read_history(ctx, 2), ctx.state.user["probes"]
        if history is None or ctx.hidden is None or ctx.first_block_residual is None:
            return None
        # The stored residuals are those of the blocks after the probe.
        whole_residuals: list[tuple[Tensor, Tensor]] = [(probes[step], probes[step] + tail) for step, tail in history]
        (latest, residual), *before = whole_residuals
        if before:
            earlier, earlier_residual = before[0]
            gamma = alignment(ctx.first_block_residual, latest, earlier).to(residual.dtype)
            residual = earlier_residual + gamma * (residual - earlier_residual)
        return ctx.hidden + residual
