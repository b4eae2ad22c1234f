"""EasyCache: skip while the latents' changes, times the rate at which the output follows them, add up to little.

Source: X. Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching" (arXiv
2507.02860); the rule is that of github.com/H-EmbodVis/EasyCache, whose output is the transformer's, here the unit's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edit_ray.cache.policies.estimates import accumulate
from edit_ray.cache.policies.option_types import Count, Number, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor


def mean_change(current: Tensor, previous: Tensor) -> Tensor:
    """mean|current - previous|, a float32 scalar [] on the tensors' device."""
    return (current.float() - previous.float()).abs().mean()


@register_policy("easycache")
@with_options
class EasyCache(CachePolicy):
    """Skips while the predicted relative changes of the unit's output add up to less than a threshold.

    At each step the latents have changed by mean|x - x'|; the output follows at the rate mean|y - y'| / mean|x - x'| of
    the last two computed steps, relative to mean|y'|. "cond" decides; "uncond" does the same at that step. Kept per
    unit of "cond", outside the store: the latents of two steps and one output [B, N, D].
    """

    uncond_follows = True
    kept_hidden, kept_latents = 1, 2

    thresh: Number = Field(
        default=0.05, description="Skip while less than this has accumulated; 0 or below never skips."
    )
    ret_steps: Count = Field(default=10, description="The first steps that always compute; so does the last.")

    def __post_init__(self) -> None:
        self._decided: dict[tuple[str, int], tuple[int, bool]] = {}  # of "cond": (step, compute) by (expert, unit)

    def most_skips(self, num_steps: int) -> int:
        """The rate takes two computed steps."""
        return max(0, num_steps - max(2, self.ret_steps) - 1) if self.thresh > 0 else 0

    def reset(self, state: UnitState) -> None:
        state.user.update(previous=None, computed=None, rate=None, size=None, accumulated=0.0)
        if state.branch == "cond":
            self._decided.pop((state.expert, state.unit_index), None)

    def should_compute(self, ctx: PolicyContext) -> bool:
        unit = ctx.expert, ctx.unit_index
        if ctx.branch == "uncond":
            step, compute = self._decided.get(unit, (None, True))
            return compute or step != ctx.step
        compute = self._decide(ctx)
        self._decided[unit] = ctx.step, compute
        return compute

    def warm(self, ctx: PolicyContext) -> None:
        """Update the state as if the step had been computed."""
        ctx.state.user.update(previous=self._latents(ctx), accumulated=0.0)

    def on_computed(self, ctx: PolicyContext) -> None:
        if ctx.branch == "uncond":
            return
        assert ctx.base is not None
        assert ctx.residual is not None
        user, output = ctx.state.user, ctx.base + ctx.residual
        latents = user["previous"]
        if user["computed"] is not None:
            latents_before, before = user["computed"]
            user["rate"] = mean_change(output, before) / mean_change(latents, latents_before)
        user.update(computed=(latents, output), size=output.float().abs().mean(), accumulated=0.0)

    def _latents(self, ctx: PolicyContext) -> Tensor:
        """A copy, as callbacks may change them in place."""
        if ctx.latents is None:
            raise ValueError(f"easycache compares a forward's latents; step {ctx.step} lacks them.")
        return ctx.latents.detach().clone()

    def _decide(self, ctx: PolicyContext) -> bool:
        user = ctx.state.user
        previous, user["previous"] = user["previous"], self._latents(ctx)
        ctx.threshold = self.thresh
        must = self.thresh <= 0 or ctx.step < self.ret_steps or ctx.step == ctx.num_steps - 1
        if must or previous is None or user["rate"] is None:
            return True
        ctx.signal = float((user["rate"] * mean_change(user["previous"], previous) / user["size"]).item())
        return accumulate(ctx, ctx.signal, self.thresh)
