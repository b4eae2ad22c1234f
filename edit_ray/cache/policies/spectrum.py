"""Spectrum: compute at growing intervals, and forecast the residual by a ridge fit of Chebyshev polynomials.

Source: J. Han et al., "Adaptive Spectral Feature Forecasting for Diffusion Sampling Acceleration" (arXiv 2603.01623,
CVPR 2026); mask, fit and blend are those of github.com/hanjq17/Spectrum, the options' names those of SGLang's
`runtime/cache/spectrum.py`. Both forecast the stack's output; here it is the residual, as in every policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from edit_ray.cache.policies.estimates import add_weighted
from edit_ray.cache.policies.option_types import Count, Natural, NotNegative, Positive, Share, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor


def growing_mask(num_steps: int, warmup_steps: int, window_size: float, flex_window: float) -> list[bool]:
    """Which steps compute: the first `warmup_steps`, then the last step of each window.

    A window has floor(w) steps; w begins at `window_size` and grows by `flex_window` with each of them.
    """
    mask, window, skipped = [], window_size, 0
    for step in range(num_steps):
        computes = step < warmup_steps or (skipped + 1) % max(1, math.floor(window)) == 0
        if step >= warmup_steps and computes:
            window = round(window + flex_window, 3)
        skipped = 0 if computes else skipped + 1
        mask.append(computes)
    return mask


def chebyshev_weights(computed: Sequence[int], step: int, *, m: int, lam: float, tau_num_steps: int) -> list[float]:
    """The weight of each computed step's residual in the forecast at `step`, in the order of `computed`.

    The forecast is phi(tau) (Phi^T Phi + lam I)^-1 Phi^T H: the residuals H at the computed steps, fitted by the
    Chebyshev polynomials T0 to Tm of tau = 2 step / `tau_num_steps` - 1. In float64.
    """
    taus = 2 * np.array([*computed, step], dtype=np.float64) / tau_num_steps - 1
    basis = np.polynomial.chebyshev.chebvander(taus, m)
    known, wanted = basis[:-1], basis[-1]
    weights: list[float] = (known @ np.linalg.solve(known.T @ known + lam * np.eye(m + 1), wanted)).tolist()
    return weights


def line_weights(computed: Sequence[int], step: int) -> list[float]:
    """The same for the line through the newest two residuals, newest first; the newest alone without a second."""
    if len(computed) < 2:
        return [1.0]
    k = (step - computed[0]) / (computed[0] - computed[1])
    return [1 + k, -k, *[0.0] * (len(computed) - 2)]


@register_policy("spectrum")
@with_options
class Spectrum(CachePolicy):
    """Forecasts a unit's residual from all those that it has computed.

    Mask and weights depend on the steps alone: a skip is one weighted sum. All computed residuals are stored, up to
    `history_size` of each unit and branch. Each expert begins with its own `warmup_steps`.
    """

    timestep_only = True

    warmup_steps: Natural = Field(default=5, description="The first steps of each expert that always compute.")
    window_size: Positive = Field(
        default=2.0, description="Steps in the first window, of which the last computes; 1 with no growth never skips."
    )
    flex_window: NotNegative = Field(
        default=0.75, description="How much a window is longer than the one before (the paper's alpha)."
    )
    m: Count = Field(default=4, description="Degree of the polynomials.")
    lam: Positive = Field(default=0.1, description="Weight of the ridge penalty.")
    w: Share = Field(
        default=1.0, description="Share of the polynomials in the forecast; the rest is the line through the last two."
    )
    history_size: Natural = Field(default=100, description="Newest computed residuals that are fitted, and stored.")
    tau_num_steps: Natural = Field(
        default=50, description="Steps over which the polynomials range; in a longer loop its own number."
    )

    def __post_init__(self) -> None:
        self.history_len = self.history_size

    def mask(self, num_steps: int) -> list[bool]:
        """The mask of an expert that makes this many steps."""
        return growing_mask(num_steps, self.warmup_steps, self.window_size, self.flex_window)

    def most_skips(self, num_steps: int) -> int:
        return self.mask(num_steps).count(False)

    def most_stored(self, num_steps: int) -> int:
        return min(self.history_len, num_steps - self.most_skips(num_steps))

    def reset(self, state: UnitState) -> None:
        state.user["seen"] = 0

    def should_compute(self, ctx: PolicyContext) -> bool:
        seen = ctx.state.user["seen"] = ctx.state.user["seen"] + 1
        return self.mask(seen)[-1]

    def weights(self, computed: Sequence[int], step: int, num_steps: int) -> list[float]:
        """The weight of each computed step's residual in the forecast at `step`, newest first as `computed`."""
        steps = max(self.tau_num_steps, num_steps)
        spectral = chebyshev_weights(computed, step, m=self.m, lam=self.lam, tau_num_steps=steps)
        if self.w == 1:
            return spectral
        local = line_weights(computed, step)
        return [self.w * a + (1 - self.w) * b for a, b in zip(spectral, local, strict=True)]

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        return add_weighted(ctx, self.history_len, lambda computed: self.weights(computed, ctx.step, ctx.num_steps))
