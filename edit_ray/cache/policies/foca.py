"""FoCa: compute every few steps; between them, the trapezoidal rule over the rate at the anchor and the latest rate.

Source: S. Zheng et al., "Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers" (arXiv
2508.16211); the rule is that of cache-dit's `calibrators/foca.py`, with rates per step at any distance of the anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from edit_ray.cache.policies.estimates import add_weighted
from edit_ray.cache.policies.intervals import AtIntervals
from edit_ray.cache.policies.option_types import Natural, Positive, with_options
from edit_ray.cache.policies.policy import PolicyContext, register_policy

if TYPE_CHECKING:
    from torch import Tensor


def trapezoid_weights(computed: Sequence[int], step: int, max_horizon: float) -> list[float]:
    """The weight of each computed step's residual in the forecast at `step`, newest first as `computed`.

    With a the last computed step before t, b the one before that, F the residuals, V those and the forecasts between
    them, the forecast is

        V(t) = F(a) + (k / 2) ((F(a) - F(b)) / (a - b) + V(t - 1) - V(t - 2)),   k = t - a,

    and F(a) without a b. Beyond `max_horizon` H, k is replaced by H²/k.
    """
    value_at = dict(zip(computed, np.eye(len(computed)), strict=True))  # a value is its weights of all residuals
    anchor = computed[-1]
    values, rate = [value_at[anchor]], None
    for now in range(anchor + 1, step + 1):
        if now in value_at:
            rate = (value_at[now] - value_at[anchor]) / (now - anchor)
            anchor = now
            values.append(value_at[anchor])
        elif rate is None:
            values.append(value_at[anchor])
        else:
            k = now - anchor
            horizon = k if k <= max_horizon else max_horizon**2 / k
            values.append(value_at[anchor] + horizon / 2 * (rate + values[-1] - values[-2]))
    weights: list[float] = values[-1].tolist()
    return weights


@register_policy("foca")
@with_options
class FoCa(AtIntervals):
    """Forecasts a unit's residual by the rule of `trapezoid_weights`, as if the loop had begun at the oldest anchor.

    The weights depend on the steps alone: a skip is one weighted sum over the stored residuals.
    """

    max_horizon: Positive = Field(
        default=3.0, description="Steps after a computed one from which on the forecast returns to its residual."
    )
    history_size: Natural = Field(default=6, description="Newest computed residuals that are stored and read.")

    def __post_init__(self) -> None:
        self.history_len = self.history_size

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        return add_weighted(
            ctx, self.history_len, lambda computed: trapezoid_weights(computed, ctx.step, self.max_horizon)
        )
