"""An explicit mask: the steps that compute are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edit_ray.cache.policies.checks import OptionError, whole
from edit_ray.cache.policies.checks import mask as as_mask
from edit_ray.cache.policies.extrapolation import add_forecast, extrapolate
from edit_ray.cache.policies.per_branch import parse_per_branch, pick_per_branch
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, register_policy

if TYPE_CHECKING:
    from torch import Tensor


@register_policy("schedule")
class Schedule(CachePolicy):
    """Computes where its mask is True."""

    timestep_only = True

    def __init__(self, *, mask: Sequence[bool] | Mapping[str, Sequence[bool]], residual_order: int = 0) -> None:
        """The mask may differ per branch and expert, not per unit.

        Args:
            mask: For each step of the loop whether it computes; or such a sequence per "cond" and "uncond", or per
                "transformer/cond" and so on.
            residual_order: 0 reuses the last computed residual, 1 extrapolates linearly from the last two.
        """
        self.mask = parse_per_branch("mask", mask, as_mask)
        self.residual_order = whole("residual_order", residual_order)
        if self.residual_order > 1:
            raise OptionError("residual_order", f"residual_order is {residual_order}; valid are 0 and 1.")
        self.history_len = self.residual_order + 1

    def check(self, num_steps: int) -> None:
        """See `CachePolicy`."""
        for key, entry in self.mask.items():
            if len(entry) != num_steps:
                name = f"mask[{key!r}]" if key else "mask"
                raise OptionError(
                    name, f"{name} has {len(entry)} entries, and the loop has {num_steps} steps; it takes one each."
                )

    def should_compute(self, ctx: PolicyContext) -> bool:
        """See `CachePolicy`."""
        return pick_per_branch("mask", self.mask, ctx.expert, ctx.branch)[ctx.step]

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        """See `CachePolicy`."""
        return add_forecast(ctx, self.residual_order, extrapolate)
