"""TeaCache: skip while the change of the timestep embedding, rescaled by a polynomial, is small.

Source: F. Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model"; the rule and the
coefficients for Wan2.1 are those of github.com/ali-vilab/TeaCache, `TeaCache4Wan2.1/teacache_generate.py`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from edit_ray.cache.policies.estimates import accumulate, relative_l1
from edit_ray.cache.policies.option_types import (
    Flag,
    Number,
    Numbers,
    OptionError,
    PerBranch,
    pick_per_branch,
    with_options,
)
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

WanVariant = Literal["t2v-1.3B", "t2v-14B", "i2v-480p", "i2v-720p"]
# By variant: for `e0` (use_ret_steps), for `e`. Highest power first.
WAN_COEFFICIENTS: dict[WanVariant, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "t2v-1.3B": (
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    ),
    "t2v-14B": (
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    ),
    "i2v-480p": (
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
        (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    ),
    "i2v-720p": (
        (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    ),
}


def must_compute(step: int, num_steps: int, use_ret_steps: bool) -> bool:
    """Whether a step always computes: the first 5 with `use_ret_steps`, else the first and the last."""
    return step < 5 if use_ret_steps else step < 1 or step >= num_steps - 1


@register_policy("teacache")
@with_options
class TeaCache(CachePolicy):
    """Skips while the rescaled changes of the signal since the last computed step add up to less than a threshold.

    The signal depends on timesteps and weights alone: both branches and all units decide alike, before the loop begins.
    Exactly one of `wan_variant` and `coefficients` is required.
    """

    timestep_only = True

    rel_l1_thresh: Number = Field(
        default=0.2, description="Skip while less than this has accumulated; 0 or below never skips."
    )
    wan_variant: WanVariant | None = Field(
        default=None,
        description="Whose published coefficients to use.",
        json_schema_extra={"choices": f"{', '.join(WAN_COEFFICIENTS)}, or coefficients= in its place"},
    )
    coefficients: PerBranch[Numbers] | None = Field(
        default=None,
        description="Of another model: those of the polynomial that rescales the relative change of the signal, "
        'highest power first; or such a sequence per "cond" and "uncond", or per "transformer/cond" and so on.',
    )
    use_ret_steps: Flag = Field(
        default=False,
        description="Watch `e0` and compute the first 5 steps, instead of `e` and the first and the last.",
    )

    def __post_init__(self) -> None:
        if (self.wan_variant is None) == (self.coefficients is None):
            given = "neither" if self.coefficients is None else "both"
            raise OptionError(
                "wan_variant",
                f"teacache takes either wan_variant= (one of {', '.join(WAN_COEFFICIENTS)}) or coefficients= (fitted "
                f"to the model at hand), and was given {given}.",
            )
        if self.wan_variant is not None:
            self.coefficients = {"": WAN_COEFFICIENTS[self.wan_variant][0 if self.use_ret_steps else 1]}

    def most_skips(self, num_steps: int) -> int:
        may_skip = [not must_compute(step, num_steps, self.use_ret_steps) for step in range(num_steps)]
        return sum(may_skip) if self.rel_l1_thresh > 0 else 0

    def reset(self, state: UnitState) -> None:
        state.user.update(previous=None, accumulated=0.0)

    def should_compute(self, ctx: PolicyContext) -> bool:
        user = ctx.state.user
        signal, previous = ctx.e0 if self.use_ret_steps else ctx.e, user["previous"]
        user["previous"] = signal
        ctx.threshold = self.rel_l1_thresh
        if previous is None:
            return True
        ctx.signal = relative_l1(signal, previous)
        if must_compute(ctx.step, ctx.num_steps, self.use_ret_steps):
            user["accumulated"] = 0.0
            return True
        coefficients = pick_per_branch("coefficients", self.coefficients or {}, ctx.expert, ctx.branch, ctx.unit_index)
        compute = accumulate(ctx, float(np.polyval(coefficients, ctx.signal)), self.rel_l1_thresh)
        if compute:
            user["accumulated"] = 0.0
        return compute

    def warm(self, ctx: PolicyContext) -> None:
        """Update the state as if the step had been computed."""
        ctx.state.user.update(previous=ctx.e0 if self.use_ret_steps else ctx.e, accumulated=0.0)
