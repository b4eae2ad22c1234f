"""SeaCache: skip while the latents, filtered to what is signal at their noise level, have changed little.

Source: "SeaCache: Spectral-Evolution-Aware Cache" (arXiv 2602.18993); the rule is that of diffusers'
`hooks/sea_cache.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from edit_ray.cache.policies.estimates import accumulate, add_forecast, extrapolate
from edit_ray.cache.policies.option_types import Count, Number, Order, Positive, with_options
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, StepSignals, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor


def wiener_filter(latents: Tensor, sigma: float, power_exp: float) -> Tensor:
    """Latents [B, C, T, h, w] at noise level `sigma`, Wiener-filtered to remove noise.

    Per axis of (T, h, w) the gain at frequency f is a P / (a² P + sigma²) with P = 1 / |f|^power_exp and a = 1 - sigma;
    the product over the axes is scaled to mean 1, so that distances compare between noise levels.
    """
    import torch  # here, so that a configuration is checked without it

    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    signal, gain = 1 - sigma, torch.ones((), device=latents.device)
    for axis in (2, 3, 4):
        size = latents.shape[axis]
        frequency = torch.fft.fftfreq(size, device=latents.device, dtype=torch.float32)
        power = 1 / (frequency.abs().pow(power_exp) + 1e-16)
        axis_gain = signal * power / (signal**2 * power + sigma**2 + 1e-16)
        gain = gain * axis_gain.reshape([size if dim == axis else 1 for dim in range(5)])
    mean = gain.mean()
    gain = gain / torch.where(mean.isfinite() & (mean > 0), mean, 1.0)
    spectrum = torch.fft.fftn(latents.float(), dim=(2, 3, 4))
    filtered: Tensor = torch.fft.ifftn(spectrum * gain, dim=(2, 3, 4)).real
    return filtered.to(latents.dtype)


def distance(current: Tensor, previous: Tensor) -> float:
    """mean|current - previous| / mean|previous| [B, ...] per batch element, then the mean; one synchronisation."""
    previous = previous.float().flatten(1)
    change = (current.float().flatten(1) - previous).abs().mean(dim=1)
    ratios: list[float] = (change / (previous.abs().mean(dim=1) + 1e-16)).tolist()
    return sum(ratios) / len(ratios)


@register_policy("seacache")
@with_options
class SeaCache(CachePolicy):
    """Skips while the changes of the filtered latents since the last computed step add up to less than a threshold.

    All units of a forward share one signal. The options' names are diffusers'.
    """

    kept_latents = 1

    threshold: Number = Field(
        default=0.25, description="Skip while less than this has accumulated; 0 or below never skips."
    )
    residual_order: Order = Field(
        default=1, description="0 reuses the last computed residual, 1 extrapolates linearly from the last two."
    )
    retention_steps: Count = Field(default=1, description="The first steps that always compute.")
    cache_end_steps: Count = Field(default=1, description="The last steps that always compute.")
    max_consecutive_cached: Count = Field(default=2, description="Skips in a row at most; 0 for no limit.")
    power_exp: Positive = Field(
        default=3.0, description="How fast a clean video's spectrum falls off with the frequency."
    )

    def __post_init__(self) -> None:
        self.history_len = self.residual_order + 1
        # Of the latest forward, shared by all its units.
        self._filtered: tuple[StepSignals, Tensor] | None = None
        self._measured: tuple[Tensor, Tensor, float] | None = None

    def most_skips(self, num_steps: int) -> int:
        between = max(0, num_steps - max(1, self.retention_steps) - self.cache_end_steps)
        computed = between // (self.max_consecutive_cached + 1) if self.max_consecutive_cached else 0
        return between - computed if self.threshold > 0 else 0

    def reset(self, state: UnitState) -> None:
        state.user.update(previous=None, accumulated=0.0)

    def should_compute(self, ctx: PolicyContext) -> bool:
        user = ctx.state.user
        current, previous = self._filter(ctx), user["previous"]
        user["previous"] = current
        ctx.threshold = self.threshold
        if previous is None or previous.shape != current.shape or self._must_compute(ctx):
            return True
        ctx.signal = self._distance(current, previous)
        return accumulate(ctx, ctx.signal, self.threshold)

    def warm(self, ctx: PolicyContext) -> None:
        """Update the state as if the step had been computed."""
        ctx.state.user.update(previous=self._filter(ctx), accumulated=0.0)

    def on_computed(self, ctx: PolicyContext) -> None:
        ctx.state.user["accumulated"] = 0.0

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        return add_forecast(ctx, self.residual_order, extrapolate)

    def _must_compute(self, ctx: PolicyContext) -> bool:
        computed, limit = ctx.state.computed_steps, self.max_consecutive_cached
        return (
            self.threshold <= 0
            or ctx.step < self.retention_steps
            or ctx.step >= ctx.num_steps - self.cache_end_steps
            or bool(limit and computed and ctx.step - computed[-1] > limit)
        )

    def _filter(self, ctx: PolicyContext) -> Tensor:
        if ctx.latents is None or ctx.sigma is None:
            missing = "its latents" if ctx.latents is None else "sigma, which the loop passes to cache_context(sigma=…)"
            raise ValueError(
                f"seacache filters a forward's latents by their noise level; step {ctx.step} lacks {missing}."
            )
        if not 0 <= ctx.sigma <= 1:
            raise ValueError(f"seacache needs the sigma of a flow-matching loop, from 0 to 1, and got {ctx.sigma}.")
        filtered = self._filtered
        if filtered is None or filtered[0] is not ctx.signals:
            filtered = self._filtered = ctx.signals, wiener_filter(ctx.latents, ctx.sigma, self.power_exp).detach()
        return filtered[1]

    def _distance(self, current: Tensor, previous: Tensor) -> float:
        """`distance`, computed once for all units of a forward."""
        measured = self._measured
        if measured is None or measured[0] is not current or measured[1] is not previous:
            measured = self._measured = current, previous, distance(current, previous)
        return measured[2]
