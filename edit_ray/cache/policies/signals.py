"""How far two tensors are apart, as the published policies measure it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_l1(current: Tensor, previous: Tensor) -> float:
    """mean|current - previous| / mean|previous|, in float32; one device synchronisation."""
    previous = previous.float()
    return float(((current.float() - previous).abs().mean() / previous.abs().mean()).item())
