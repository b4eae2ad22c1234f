"""MagCache: skip while the measured ratios of residual magnitudes predict a small error of the stored residual.

Source: Z. Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache"; the rule and the interpolation are
those of diffusers' `hooks/mag_cache.py`, computed in float32 as there so that decisions are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edit_ray.cache.policies.option_types import (
    Count,
    Number,
    OptionError,
    PerBranch,
    Positives,
    Share,
    pick_per_branch,
    with_options,
)
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy


def fit_ratios(ratios: Sequence[float], num_steps: int) -> npt.NDArray[np.float32]:
    """One ratio per step, from those measured at another number of steps: each step takes the nearest."""
    measured = np.asarray(ratios, dtype=np.float32)
    if len(measured) == num_steps:
        return measured
    if num_steps == 1:
        return measured[-1:]
    scale = np.float32((len(measured) - 1) / (num_steps - 1))
    nearest = np.round(np.arange(num_steps, dtype=np.float32) * scale).astype(np.int64)
    return measured[nearest]


_ONE, _ZERO = np.float32(1), np.float32(0)


@dataclass
class MagnitudeError:
    """The estimated error of the last computed residual, grown over the steps since."""

    ratio: np.float32 = _ONE
    error: np.float32 = _ZERO
    steps: int = 0

    def admits(self, ratio: np.float32, threshold: float, max_skip_steps: int) -> bool:
        """Whether the residual may serve one more step, whose magnitude is `ratio` times that of the step before."""
        with np.errstate(over="ignore"):
            self.ratio *= ratio
            self.error += abs(_ONE - self.ratio)
        self.steps += 1
        return bool(threshold > 0 and self.error <= np.float32(threshold) and self.steps <= max_skip_steps)


@register_policy("magcache")
@with_options
class MagCache(CachePolicy):
    """Skips while the error that the magnitudes predict stays within a threshold, and for few steps in a row.

    State is per expert and branch; steps count through the loop, also across experts.
    """

    granularities = ("stack",)
    timestep_only = True

    threshold: Number = Field(default=0.12, description="Skip up to this error; 0 or below never skips.")
    max_skip_steps: Count = Field(default=2, description="Skips in a row at most.")
    retention_ratio: Share = Field(default=0.2, description="Share of the steps, from the first, that always compute.")
    mag_ratios: PerBranch[Positives] | None = Field(
        default=None,
        description="Required, measured on the model: for each step the magnitude of the stack's residual, relative to "
        'the step before; or such a sequence per "cond" and "uncond", or per "transformer/cond" and so on.',
    )

    def __post_init__(self) -> None:
        if self.mag_ratios is None:
            raise OptionError(
                "mag_ratios",
                "magcache needs mag_ratios=, measured on the model at hand: a sequence with one ratio a step, or a "
                'mapping with such a sequence per branch ("cond", "uncond").',
            )

    def most_skips(self, num_steps: int) -> int:
        later = num_steps - max(1, self._retained(num_steps))
        return later - later // (self.max_skip_steps + 1) if self.threshold > 0 else 0

    def _retained(self, num_steps: int) -> int:
        return int(self.retention_ratio * num_steps + 0.5)

    def reset(self, state: UnitState) -> None:
        state.user["error"] = None

    def should_compute(self, ctx: PolicyContext) -> bool:
        user = ctx.state.user
        error: MagnitudeError | None = user["error"]
        ctx.threshold = self.threshold
        ratios = pick_per_branch("mag_ratios", self.mag_ratios or {}, ctx.expert, ctx.branch, ctx.unit_index)
        ratio = fit_ratios(ratios, ctx.num_steps)[ctx.step]
        ctx.signal = float(ratio)
        if error is None:  # nothing was computed that could serve
            user["error"] = MagnitudeError()
            return True
        if ctx.step < self._retained(ctx.num_steps):
            return True
        admitted = error.admits(ratio, self.threshold, self.max_skip_steps)
        ctx.accumulated = float(error.error)
        if not admitted:
            user["error"] = MagnitudeError()
        return not admitted

    def warm(self, ctx: PolicyContext) -> None:
        """Update the state as if the step had been computed."""
        ctx.state.user["error"] = MagnitudeError()
