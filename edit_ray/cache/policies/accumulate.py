"""The rule that TeaCache, SeaCache and DiCache share: changes add up, and while they stay small the unit is skipped."""

from __future__ import annotations


def accumulate(total: float, change: float, threshold: float) -> tuple[bool, float]:
    """Whether to compute, and the new total; whoever computes goes on from 0.

    A threshold of 0 or below always computes, and so does a change that is not a number.
    """
    total += change
    return not (threshold > 0 and total < threshold), total
