"""How far two tensors are apart, and whether accumulated changes reach a policy's threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_l1(current: Tensor, previous: Tensor) -> float:
    """mean|current - previous| / mean|previous|, in float32; one device synchronisation."""
    previous = previous.float()
    return float(((current.float() - previous).abs().mean() / previous.abs().mean()).item())


def accumulate(total: float, change: float, threshold: float) -> tuple[bool, float]:
    """Whether to compute, and the new total, which the caller resets to 0 on a computed step.

    TeaCache, SeaCache and DiCache share this rule.

    A threshold of 0 or below always computes, and so does a change that is not a number.
    """
    total += change
    return not (threshold > 0 and total < threshold), total
