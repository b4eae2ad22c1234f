"""Warm start: the first steps of a segment reuse the residuals of earlier segments, the others follow another policy.

Source: the `warmstart_reuse` of github.com/Antlera/EDiT, which is align="last" with combine="mean": an early, noisy
step rebuilt from late, clean ones. align="step" reuses the residuals of the very same step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edit_ray.cache.policies.checks import OptionError, whole
from edit_ray.cache.policies.make import make_policy
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor

_OWN = "warmstart_reuse: has computed"


@register_policy("warmstart_reuse")
class WarmstartReuse(CachePolicy):
    """At a step before `warm_steps` a unit reuses what its reuse window has stored; where there is nothing it computes.

    Later steps follow the inner policy, but the first of them computes if all before were reused: only what a call has
    computed itself serves its later steps.
    """

    def __init__(
        self,
        *,
        warm_steps: int = 2,
        align: str = "step",
        combine: str = "latest",
        inner: str | CachePolicy = "teacache",
        **inner_options: Any,
    ) -> None:
        """The inner policy also says which granularities there are.

        Args:
            warm_steps: How many first steps are reused.
            align: "step": residuals of the same step; "last": the last that each segment of the window computed.
            combine: "latest": of the newest segment in the window that has one; "mean": of all of them.
            inner: A policy, or the name of one, made with `inner_options`.
        """
        self.warm_steps = whole("warm_steps", warm_steps)
        if align not in ("step", "last"):
            raise OptionError("align", f"align is {align!r}; valid are 'step' and 'last'.")
        if combine not in ("latest", "mean"):
            raise OptionError("combine", f"combine is {combine!r}; valid are 'latest' and 'mean'.")
        self.align, self.combine = align, combine
        self.inner = make_policy(inner, inner_options)
        if isinstance(self.inner, WarmstartReuse):
            raise OptionError("inner", "inner is warmstart_reuse; valid is any other policy.")
        self.granularities = self.inner.granularities
        self.needs_first_block_probe = self.inner.needs_first_block_probe
        self.timestep_only = self.inner.timestep_only
        self.history_len = self.inner.history_len

    def check(self, num_steps: int) -> None:
        """See `CachePolicy`."""
        self.inner.check(num_steps)

    def reset(self, state: UnitState) -> None:
        """See `CachePolicy`."""
        self.inner.reset(state)
        state.user[_OWN] = False

    def should_compute(self, ctx: PolicyContext) -> bool:
        """See `CachePolicy`."""
        if ctx.step >= self.warm_steps and ctx.state.user[_OWN]:
            return self.inner.should_compute(ctx)
        self.inner.warm(ctx)
        if ctx.step < self.warm_steps and ctx.residuals.window_steps(self._slot(ctx)) > 0:
            return False
        ctx.state.user[_OWN] = True
        return True

    def warm(self, ctx: PolicyContext) -> None:
        """See `CachePolicy`."""
        self.inner.warm(ctx)

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        """See `CachePolicy`."""
        if ctx.step >= self.warm_steps:
            return self.inner.reconstruct(ctx)
        residuals = ctx.residuals.window(self._slot(ctx))
        if not residuals or ctx.base is None:
            return None
        return ctx.base + (
            residuals[-1] if self.combine == "latest" else sum(residuals[1:], residuals[0]) / len(residuals)
        )

    def keeps(self, step: int) -> bool:
        """See `CachePolicy`. The last computed residual stays anyway."""
        return (self.align == "step" and step < self.warm_steps) or self.inner.keeps(step)

    def on_computed(self, ctx: PolicyContext) -> None:
        """See `CachePolicy`."""
        ctx.state.user[_OWN] = True
        self.inner.on_computed(ctx)

    def _slot(self, ctx: PolicyContext) -> int | None:
        return ctx.step if self.align == "step" else None
