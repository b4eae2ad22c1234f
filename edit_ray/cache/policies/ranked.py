"""Skips that were measured: the forwards that a model misses least, in the order in which it misses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edit_ray.cache.policies.checks import OptionError, whole
from edit_ray.cache.policies.checks import ranks as as_ranks
from edit_ray.cache.policies.per_branch import parse_per_branch, pick_per_branch
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, register_policy


@register_policy("ranked")
class Ranked(CachePolicy):
    """Skips the forwards of lowest rank, as many as told; `edit-ray calibrate --policy ranked` finds the ranks."""

    timestep_only = True

    def __init__(
        self, *, skip_rank: Sequence[int | None] | Mapping[str, Sequence[int | None]], skips: int | None = None
    ) -> None:
        """Ranks may differ per branch and expert, not per unit.

        Args:
            skip_rank: For each step of the loop its rank among all forwards, from 0 for the one that is missed least,
                and None for one that always computes; or such a sequence per "cond" and "uncond", or per
                "transformer/cond" and so on.
            skips: How many forwards are skipped, 0 for none; unless given, half of all that `skip_rank` lists.
        """
        self.skip_rank: dict[str, tuple[int | None, ...]] = parse_per_branch("skip_rank", skip_rank, as_ranks)
        listed = sum(len(ranks) for ranks in self.skip_rank.values())
        self.skips = listed // 2 if skips is None else whole("skips", skips, None)

    def check(self, num_steps: int) -> None:
        """See `CachePolicy`."""
        for key, entry in self.skip_rank.items():
            if len(entry) != num_steps:
                name = f"skip_rank[{key!r}]" if key else "skip_rank"
                raise OptionError(
                    name,
                    f"{name} has {len(entry)} entries, and the loop has {num_steps} steps; it takes one each, so it "
                    "has to be measured at the loop's number of steps.",
                )

    def should_compute(self, ctx: PolicyContext) -> bool:
        """See `CachePolicy`."""
        rank = pick_per_branch("skip_rank", self.skip_rank, ctx.expert, ctx.branch)[ctx.step]
        return rank is None or rank >= self.skips


def ranks_of(order: Sequence[tuple[str, int]], owners: Sequence[str], num_steps: int) -> dict[str, Any]:
    """`skip_rank` for an order of skips (owner such as "transformer/cond", step), what is missed least first."""
    ranks: dict[str, list[int | None]] = {owner: [None] * num_steps for owner in owners}
    for rank, (owner, step) in enumerate(order):
        ranks[owner][step] = rank
    return ranks
