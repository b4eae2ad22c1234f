"""Warm start: the first steps of a segment reuse the residuals of earlier segments, the others follow another policy.

Source: the `warmstart_reuse` of github.com/Antlera/EDiT, which is align="last" with combine="mean": an early, noisy
step rebuilt from late, clean ones. align="step" reuses the residuals of the very same step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from edit_ray.cache.policies.option_types import Count, OptionError, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, make_policy, register_policy

if TYPE_CHECKING:
    from torch import Tensor

_OWN = "warmstart_reuse: has computed"


@register_policy("warmstart_reuse")
@with_options(extra="allow")
class WarmstartReuse(CachePolicy):
    """Before `warm_steps` a unit reuses residuals of its reuse window, or computes if there are none.

    Later steps follow the inner policy, and only reuse residuals of their own call: the first of them computes if all
    earlier steps were reused. The inner policy defines the granularities.
    """

    warm_steps: Count = Field(default=2, description="How many first steps are reused.")
    align: Literal["step", "last"] = Field(
        default="step",
        description='"step": residuals of the same step; "last": the last that each segment of the window computed.',
    )
    combine: Literal["latest", "mean"] = Field(
        default="latest",
        description='"latest": of the newest segment in the window that has one; "mean": of all of them.',
    )
    inner: Annotated[
        CachePolicy, PlainValidator(lambda given: given), WithJsonSchema({"valid": "the name of another policy"})
    ] = Field(  # type: ignore[assignment]  # the name becomes its policy
        default="teacache",
        description="What decides the later steps, made with all other options; or a `CachePolicy`.",
    )

    def __post_init__(self) -> None:
        own = self.__pydantic_fields__  # type: ignore[attr-defined]
        others = {name: self.__dict__.pop(name) for name in list(self.__dict__) if name not in own}
        inner = self.inner = make_policy(self.inner, others)
        if isinstance(inner, WarmstartReuse):
            raise OptionError("inner", "inner is warmstart_reuse; it must be any other policy.")
        self.granularities = inner.granularities
        self.needs_first_block_probe = inner.needs_first_block_probe
        self.timestep_only = inner.timestep_only
        self.uncond_follows = inner.uncond_follows
        self.history_len = inner.history_len
        self.kept_hidden, self.kept_latents = inner.kept_hidden, inner.kept_latents

    def check(self, num_steps: int) -> None:
        self.inner.check(num_steps)

    def most_skips(self, num_steps: int) -> int:
        """All warm steps, and of the later ones as many as the inner policy can skip; the first later step computes."""
        later = max(0, num_steps - self.warm_steps)
        return num_steps - later + min(max(0, later - 1), self.inner.most_skips(num_steps))

    def reset(self, state: UnitState) -> None:
        self.inner.reset(state)
        state.user[_OWN] = False

    def should_compute(self, ctx: PolicyContext) -> bool:
        if ctx.step >= self.warm_steps and ctx.state.user[_OWN]:
            return self.inner.should_compute(ctx)
        self.inner.warm(ctx)
        if ctx.step < self.warm_steps and ctx.residuals.window_steps(self._slot(ctx)) > 0:
            return False
        ctx.state.user[_OWN] = True
        return True

    def warm(self, ctx: PolicyContext) -> None:
        self.inner.warm(ctx)

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        if ctx.step >= self.warm_steps:
            return self.inner.reconstruct(ctx)
        residuals = ctx.residuals.window(self._slot(ctx))
        if not residuals or ctx.base is None:
            return None
        return ctx.base + (
            residuals[-1] if self.combine == "latest" else sum(residuals[1:], residuals[0]) / len(residuals)
        )

    def keeps(self, step: int) -> bool:
        """The last computed residual is kept anyway."""
        return (self.align == "step" and step < self.warm_steps) or self.inner.keeps(step)

    def on_computed(self, ctx: PolicyContext) -> None:
        ctx.state.user[_OWN] = True
        self.inner.on_computed(ctx)

    def _slot(self, ctx: PolicyContext) -> int | None:
        return ctx.step if self.align == "step" else None
