"""Measures on uncached runs what TeaCache and MagCache need to know of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edit_ray.cache.policies import CachePolicy, PolicyContext, relative_l1
from edit_ray.engine.pipeline import EditWanPipeline

DEGREE = 4  # of TeaCache's published polynomials
Owner = str  # "transformer/cond"


@dataclass
class Measured:
    """Of one branch of one expert, by call and step: the signal's relative change, the residual's, its ratio of norms.

    A call's first step has no predecessor and is left out.
    """

    signal: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    ratios: list[dict[int, float]] = field(default_factory=list)


class Observer(CachePolicy):
    """Computes every step, and measures the residual of the whole stack."""

    granularities = ("stack",)

    def __init__(self, *, use_ret_steps: bool = False) -> None:
        self.use_ret_steps = use_ret_steps
        self.measured: dict[Owner, Measured] = {}

    def should_compute(self, ctx: PolicyContext) -> bool:
        """Compute always."""
        return True

    def on_computed(self, ctx: PolicyContext) -> None:
        """Compare the residual with that of the step before."""
        assert ctx.residual is not None
        measured = self.measured.setdefault(f"{ctx.expert}/{ctx.branch}", Measured())
        signal, previous = ctx.e0 if self.use_ret_steps else ctx.e, ctx.state.user.get("previous")
        if previous is None:
            measured.ratios.append({})
        else:
            before_signal, before = previous
            measured.signal.append(relative_l1(signal, before_signal))
            measured.change.append(relative_l1(ctx.residual, before))
            norms = ctx.residual.float().norm(dim=-1) / before.float().norm(dim=-1)
            measured.ratios[-1][ctx.step] = norms.mean().item()
        ctx.state.user["previous"] = (signal, ctx.residual)


def observe(
    pipe: EditWanPipeline, prompts: Sequence[str], seed: int, call: Mapping[str, Any], *, use_ret_steps: bool = False
) -> dict[Owner, Measured]:
    """Run the prompts uncached, one by one with seeds from `seed` on; `call` has the pipeline's other arguments."""
    observer = Observer(use_ret_steps=use_ret_steps)
    pipe.enable_cache(observer, call["num_inference_steps"], sigmas=call.get("sigmas"))
    try:
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + index)
            pipe(prompt, generator=generator, output_type="latent", **call)
    finally:
        pipe.disable_cache()
    return observer.measured


def fit_teacache(measured: Mapping[Owner, Measured], use_ret_steps: bool) -> dict[str, Any]:
    """TeaCache's options: per expert and branch a polynomial from the signal's change to the residual's.

    Fitted by least squares on the relative error, as the sum of many small changes counts.

    Raises:
        ValueError: a branch has made one step only, so there is no change.
    """
    coefficients = {}
    for owner, seen in measured.items():
        if not seen.signal:
            raise ValueError(
                f"{owner} made one step a call, and there is no change to measure; it must make at least 2."
            )
        signal, change = np.array(seen.signal), np.array(seen.change)
        degree = min(DEGREE, max(0, len(np.unique(signal)) - 1))
        fitted = np.polyfit(signal, change, degree, w=1 / np.maximum(change, 1e-6))
        coefficients[owner] = [float(coefficient) for coefficient in fitted]
    return {"coefficients": coefficients, "use_ret_steps": use_ret_steps}


def fit_magcache(measured: Mapping[Owner, Measured], num_steps: int) -> dict[str, Any]:
    """MagCache's `mag_ratios`: by "expert/branch" each step's mean ratio of residual norms to the step before, or 1."""
    ratios = {}
    for owner, seen in measured.items():
        by_step = [[call[step] for call in seen.ratios if step in call] for step in range(num_steps)]
        ratios[owner] = [float(np.mean(values)) if values else 1.0 for values in by_step]
    return {"mag_ratios": ratios}


def plot_fit(measured: Mapping[Owner, Measured], options: Mapping[str, Any]) -> Any:
    """A matplotlib figure of TeaCache's fit, or MagCache's ratios, against the measurements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(measured), 4.0), layout="constrained")
    for axes, (owner, seen) in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured.items(), strict=True):
        if "coefficients" in options:
            grid: NDArray[np.float64] = np.linspace(min(seen.signal), max(seen.signal), 200)
            axes.scatter(seen.signal, seen.change, s=8, alpha=0.5, label="measured")
            axes.plot(grid, np.polyval(options["coefficients"][owner], grid), color="C1", label="fit")
            axes.set(xlabel="relative change of the timestep embedding", ylabel="relative change of the residual")
        else:
            points = [point for call in seen.ratios for point in call.items()]
            axes.scatter(*zip(*points, strict=True), s=8, alpha=0.5, label="measured")
            axes.plot(options["mag_ratios"][owner], color="C1", label="mean")
            axes.set(xlabel="step", ylabel="ratio of the residual's norms")
        axes.set_title(owner)
        axes.legend()
    return figure
