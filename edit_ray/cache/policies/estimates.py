"""How far two tensors are apart, and what a residual will be from those of the last computed steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edit_ray.cache.policies.policy import PolicyContext

if TYPE_CHECKING:
    from torch import Tensor

Weights = Sequence["float | Tensor"]  # of each residual: a number, or a tensor [B, 1, 1]
Forecast = Callable[[Sequence[tuple[int, "Tensor"]], int, int], "Tensor"]


def relative_l1(current: Tensor, previous: Tensor) -> float:
    """mean|current - previous| / mean|previous|, in float32; one device synchronisation."""
    previous = previous.float()
    return float(((current.float() - previous).abs().mean() / previous.abs().mean()).item())


def accumulate(ctx: PolicyContext, change: float, threshold: float) -> bool:
    """Add to the unit's `accumulated`; whether to compute. The caller resets it to 0 on a computed step.

    TeaCache, SeaCache and DiCache share this rule. A threshold of 0 or below always computes, and so does a change
    that is not a number.
    """
    ctx.accumulated = ctx.state.user["accumulated"] = ctx.state.user["accumulated"] + change
    return not (threshold > 0 and ctx.accumulated < threshold)


def forecast(history: Sequence[tuple[int, Tensor]], step: int, max_order: int) -> Tensor:
    """The residual at `step` by TaylorSeer's expansion around the newest of `history`, (step, residual) newest first.

    Divided differences D0 = F, D(j+1) = (Dj - Dj of the computed step before) / (steps between the two) stand for the
    derivatives; the result is the sum of Dj k^j / j!, k steps after the newest. The newest `max_order` + 1 residuals
    determine them: that equals updating them at each computed step. In float32, returned in the residuals' dtype;
    order 0 is the newest residual itself.

    Source: J. Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers".
    """
    if max_order == 0:
        return history[0][1]
    factors: list[Tensor] = []
    last = 0
    for computed, residual in reversed(history[: max_order + 1]):
        updated = [residual.float()]
        for order, previous in enumerate(factors[:max_order]):
            updated.append((updated[order] - previous) / (computed - last))
        factors, last = updated, computed
    result = factors[0]
    for order, factor in enumerate(factors[1:], start=1):
        result = result + factor * ((step - last) ** order / math.factorial(order))
    return result.to(history[0][1].dtype)


def extrapolate(history: Sequence[tuple[int, Tensor]], step: int, order: int) -> Tensor:
    """`forecast` of order 0 or 1, rounded as diffusers' `hooks/sea_cache.py` rounds its own."""
    (latest, residual), *before = history[: order + 1]
    if not before:
        return residual
    previous, earlier = before[0]
    change = residual.float() - earlier.float()
    return (residual.float() + change * ((step - latest) / (latest - previous))).to(residual.dtype)


def read_history(ctx: PolicyContext, count: int) -> list[tuple[int, Tensor]] | None:
    """The last `count` computed residuals, newest first, or all if there are fewer; None if the store has evicted one.

    Using the remaining ones would make the output depend on what the store happens to hold.
    """
    computed = ctx.state.computed_steps[-count:][::-1]
    history = ctx.residuals.history()[: len(computed)]
    return history if history and [step for step, _ in history] == computed else None


def add_forecast(ctx: PolicyContext, max_order: int, predict: Forecast = forecast) -> Tensor | None:
    """The unit's output [B, N, D] with a predicted residual; None if a residual that it needs is missing."""
    history = read_history(ctx, max_order + 1)
    return None if history is None or ctx.base is None else ctx.base + predict(history, ctx.step, max_order)


def weighted_sum(residuals: Sequence[Tensor], weights: Weights) -> Tensor:
    """The sum of residuals [B, N, D] times their weights, in float32 at least; returned in the residuals' dtype."""
    import torch  # here, so that a configuration is checked without it

    dtype = residuals[0].dtype
    result = torch.zeros_like(residuals[0], dtype=torch.promote_types(dtype, torch.float32))
    for residual, weight in zip(residuals, weights, strict=True):
        result.add_(residual * weight) if isinstance(weight, torch.Tensor) else result.add_(residual, alpha=weight)
    return result.to(dtype)


def add_weighted(ctx: PolicyContext, count: int, weigh: Callable[[Sequence[int]], Weights]) -> Tensor | None:
    """The unit's output [B, N, D] with a weighted sum of its last `count` computed residuals; None if one is missing.

    `weigh(computed)` gives their weights, in the order of their steps `computed`, newest first.
    """
    history = read_history(ctx, count)
    if history is None or ctx.base is None:
        return None
    steps, residuals = zip(*history, strict=True)
    return ctx.base + weighted_sum(residuals, weigh(steps))
