"""Intervals, and which measured points make up a front: the pure parts of the benchmark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from edit_ray.tuning.confidence import RESAMPLES, resampled_means
from edit_ray.tuning.likeness import Likeness

# Shares are means of fractions: a half that comes out a rounding error above a half is a half.
_ROUNDING = 1e-9

Interval = tuple[float, float, float]
"""A mean and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Point:
    """A method at one setting, over all samples; lists hold one value a sample, the seeds of a prompt side by side.

    Those from `gmsd` on, which `edit_ray.tuning.likeness` explains, are empty where results are older than they.
    `share` is blocks evaluated / all blocks, `time` is wall time / uncached wall time.
    """

    method: str
    group: str
    setting: dict[str, Any]
    share: float
    time: float
    psnr: list[float]
    ssim: list[float]
    shares: list[float]
    gmsd: list[float] = field(default_factory=list)
    flicker: list[float] = field(default_factory=list)
    worst_psnr: list[float] = field(default_factory=list)
    worst_ssim: list[float] = field(default_factory=list)
    worst_gmsd: list[float] = field(default_factory=list)


MEASURES = tuple(of.name for of in fields(Likeness))
"""The lists of a point that are measures of likeness."""


def mean_interval(values: Sequence[float], seeds: int, resamples: int = RESAMPLES) -> Interval:
    """The mean over samples with its 95 % bootstrap interval (percentiles, from a fixed seed).

    Prompts are drawn, each with all its `seeds` values: videos of one prompt are no independent samples.
    """
    means = resampled_means(values, seeds, resamples)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return sum(values) / len(values), low, high


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def best_at(points: Iterable[Point], share: float) -> Point | None:
    """The point of the highest mean PSNR among those measured at or below a share of the blocks, or None."""
    within = [point for point in points if point.share <= share + _ROUNDING]
    return max(within, key=lambda point: mean(point.psnr), default=None)


@dataclass(frozen=True)
class Comparison:
    """Our best point and the best peer's at or below a share of the blocks; `difference` in dB, paired by sample."""

    speedup: float
    ours: Point | None
    peer: Point | None
    difference: Interval | None


def compare(points: Sequence[Point], speedup: float, seeds: int) -> Comparison:
    """Ours against the peers at 1 / `speedup` of the blocks, over the same samples."""
    ours = best_at((point for point in points if point.group == "ours"), 1 / speedup)
    peer = best_at((point for point in points if point.group == "peer"), 1 / speedup)
    if ours is None or peer is None:
        return Comparison(speedup, ours, peer, None)
    differences = [a - b for a, b in zip(ours.psnr, peer.psnr, strict=True)]
    return Comparison(speedup, ours, peer, mean_interval(differences, seeds))
