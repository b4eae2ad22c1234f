"""MagCache: skip while the measured shrinkage of residuals from step to step says that an old one is still near.

Source: Z. Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache"; the rule and the interpolation are
those of diffusers' `hooks/mag_cache.py`, in whose float32 they are carried out so that decisions come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edit_ray.cache.policies.checks import OptionError, finite, fraction, numbers, positive, whole
from edit_ray.cache.policies.per_branch import parse_per_branch, pick_per_branch
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, UnitState, register_policy


def fit_ratios(ratios: Sequence[float], num_steps: int) -> npt.NDArray[np.float32]:
    """One ratio a step, from those measured at another number of steps: each step takes the nearest."""
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
class MagCache(CachePolicy):
    """Skips while the error that the magnitudes predict stays within a threshold, and for few steps in a row.

    State is per expert and branch, steps are those of the loop: a second expert goes on where the first one ended.
    """

    granularities = ("stack",)
    timestep_only = True

    def __init__(
        self,
        *,
        threshold: float = 0.12,
        max_skip_steps: int = 2,
        retention_ratio: float = 0.2,
        mag_ratios: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """`mag_ratios` is required: it is measured on the model.

        Args:
            threshold: Skip up to this error; 0 or below never skips.
            max_skip_steps: Skips in a row at most.
            retention_ratio: Share of the steps, from the first, that always compute.
            mag_ratios: For each step the magnitude of the stack's residual, relative to the step before; or such a
                sequence per "cond" and "uncond", or per "transformer/cond" and so on.
        """
        self.threshold = finite("threshold", threshold)
        self.max_skip_steps = whole("max_skip_steps", max_skip_steps)
        self.retention_ratio = fraction("retention_ratio", retention_ratio)
        if mag_ratios is None:
            raise OptionError(
                "mag_ratios",
                "magcache needs mag_ratios=, measured on the model at hand: a sequence with one ratio a step, or a "
                'mapping with such a sequence per branch ("cond", "uncond").',
            )
        self.mag_ratios = parse_per_branch("mag_ratios", mag_ratios, _ratios)

    def reset(self, state: UnitState) -> None:
        """See `CachePolicy`."""
        state.user["error"] = None

    def should_compute(self, ctx: PolicyContext) -> bool:
        """See `CachePolicy`."""
        user = ctx.state.user
        error: MagnitudeError | None = user["error"]
        ctx.threshold = self.threshold
        ratios = pick_per_branch("mag_ratios", self.mag_ratios, ctx.expert, ctx.branch)
        ratio = fit_ratios(ratios, ctx.num_steps)[ctx.step]
        ctx.signal = float(ratio)
        if error is None:  # nothing was computed that could serve
            user["error"] = MagnitudeError()
            return True
        if ctx.step < int(self.retention_ratio * ctx.num_steps + 0.5):
            return True
        admitted = error.admits(ratio, self.threshold, self.max_skip_steps)
        ctx.accumulated = float(error.error)
        if not admitted:
            user["error"] = MagnitudeError()
        return not admitted

    def warm(self, ctx: PolicyContext) -> None:
        """See `CachePolicy`: as after a computed step."""
        ctx.state.user["error"] = MagnitudeError()


def _ratios(name: str, value: Any) -> tuple[float, ...]:
    return tuple(positive(f"{name}[{i}]", ratio) for i, ratio in enumerate(numbers(name, value)))
