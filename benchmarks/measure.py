"""Likeness of videos, intervals, and which measured points make up a front: the pure parts of the benchmark."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_DB = 100.0  # what identical videos get in place of infinity
# Shares are means of fractions: a half that comes out a rounding error above a half is a half.
_ROUNDING = 1e-9

Interval = tuple[float, float, float]
"""A mean and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Point:
    """A method at one setting, over all samples; lists hold one value a sample, the seeds of a prompt side by side.

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


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of a video [..., H, W] in [0, 1] against another, at most `MOST_DB`."""
    error = (video.double() - reference.double()).square().mean().item()
    return MOST_DB if error == 0 else min(MOST_DB, -10 * torch.tensor(error).log10().item())


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity of a video [..., H, W] in [0, 1] with another: the mean over frames and channels.

    Source: Z. Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with
    their Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, where the window lies inside.
    """
    x, y = (images.double().reshape(-1, 1, *images.shape[-2:]) for images in (video, reference))
    line = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64, device=x.device).square() / (2 * 1.5**2))
    line = line / line.sum()

    def blurred(images: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(images, line.view(1, 1, 11, 1)), line.view(1, 1, 1, 11))

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (luminance * structure).mean().item()


def mean_interval(values: Sequence[float], seeds: int, resamples: int = 10_000) -> Interval:
    """The mean over samples with its 95 % bootstrap interval (percentiles, from a fixed seed).

    Prompts are drawn, each with all its `seeds` values: videos of one prompt are no independent samples.
    """
    prompts = torch.tensor(values, dtype=torch.float64).view(-1, seeds).mean(1)
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=torch.Generator().manual_seed(0))
    low, high = prompts[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return prompts.mean().item(), low, high


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
