"""Explicit masks: all steps compute, those of a list, or those whose omission changes the result most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edit_ray.cache.policies.dmd import DynamicModes
from edit_ray.cache.policies.estimates import add_forecast, extrapolate
from edit_ray.cache.policies.option_types import (
    Forecasts,
    Mask,
    PerBranch,
    Ranks,
    Whole,
    check_lengths,
    pick_per_branch,
    with_options,
)
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy
from edit_ray.cache.policies.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import Tensor


_REUSE: Any = "reuse"  # as it is given, for all branches and steps


@register_policy("always")
class Always(CachePolicy):
    """The baseline: never skips."""

    timestep_only = True

    def most_skips(self, num_steps: int) -> int:
        return 0

    def should_compute(self, ctx: PolicyContext) -> bool:
        return True


@register_policy("schedule")
@with_options
class Schedule(CachePolicy):
    """Computes where its mask is True; `edit-ray tune` searches masks. They may differ per branch, expert and unit."""

    timestep_only = True

    mask: PerBranch[Mask] = Field(
        description='For each step of the loop whether it computes; or such a sequence per "cond" and "uncond", or per '
        '"transformer/cond" and so on; with units, per "transformer/cond/0" and so on.'
    )
    forecast: PerBranch[Forecasts] = Field(
        default=_REUSE,
        validate_default=True,
        description="What stands in for a skipped residual: `reuse`, the last computed one; `linear`, the line through "
        "the last two; the forecast of `spectrum` or `dmd` with its defaults. One for all steps, or one for each; or "
        "such as `mask` per branch and unit.",
    )

    def __post_init__(self) -> None:
        self._forecasters = {"spectrum": Spectrum(), "dmd": DynamicModes()}
        used = {name for names in self.forecast.values() for name in names}
        read = {"reuse": 1, "linear": 2} | {name: of.history_len for name, of in self._forecasters.items()}
        self.history_len = max(read[name] for name in used)

    def check(self, num_steps: int) -> None:
        check_lengths("mask", self.mask, num_steps)
        check_lengths("forecast", {key: names for key, names in self.forecast.items() if len(names) > 1}, num_steps)

    def most_skips(self, num_steps: int) -> int:
        return max(mask[1:].count(False) for mask in map(list, self.mask.values()))

    def most_stored(self, num_steps: int) -> int:
        return min(self.history_len, max(mask.count(True) for mask in map(list, self.mask.values())))

    def reset(self, state: UnitState) -> None:
        for forecaster in self._forecasters.values():
            forecaster.reset(state)

    def should_compute(self, ctx: PolicyContext) -> bool:
        return pick_per_branch("mask", self.mask, ctx.expert, ctx.branch, ctx.unit_index)[ctx.step]

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        names = pick_per_branch("forecast", self.forecast, ctx.expert, ctx.branch, ctx.unit_index)
        name = names[ctx.step % len(names)]
        if name in self._forecasters:
            return self._forecasters[name].reconstruct(ctx)
        return add_forecast(ctx, int(name == "linear"), extrapolate)


@register_policy("ranked")
@with_options
class Ranked(CachePolicy):
    """Skips the forwards of lowest rank; `edit-ray calibrate --policy ranked` finds the ranks.

    Ranks may differ per branch, expert and unit.
    """

    timestep_only = True

    skip_rank: PerBranch[Ranks] = Field(
        description="For each step of the loop its rank among all forwards, from 0 for the one whose omission changes "
        'least, and None for one that always computes; or such a sequence per "cond" and "uncond", or per '
        '"transformer/cond" and so on.'
    )
    skips: Whole | None = Field(
        default=None,
        description="How many forwards are skipped, 0 for none; unless given, half of all that `skip_rank` lists.",
    )

    def __post_init__(self) -> None:
        if self.skips is None:
            self.skips = sum(map(len, self.skip_rank.values())) // 2

    def check(self, num_steps: int) -> None:
        measured = ", so it has to be measured at the loop's number of steps"
        check_lengths("skip_rank", self.skip_rank, num_steps, measured)

    def most_skips(self, num_steps: int) -> int:
        skips = self.skips or 0
        return max(sum(rank is not None and rank < skips for rank in ranks[1:]) for ranks in self.skip_rank.values())

    def should_compute(self, ctx: PolicyContext) -> bool:
        rank = pick_per_branch("skip_rank", self.skip_rank, ctx.expert, ctx.branch, ctx.unit_index)[ctx.step]
        return rank is None or rank >= (self.skips or 0)


def ranks_of(order: Sequence[tuple[str, int]], owners: Sequence[str], num_steps: int) -> dict[str, Any]:
    """`skip_rank` for an order of skips (owner such as "transformer/cond", step), least change first."""
    ranks: dict[str, list[int | None]] = {owner: [None] * num_steps for owner in owners}
    for rank, (owner, step) in enumerate(order):
        ranks[owner][step] = rank
    return ranks
