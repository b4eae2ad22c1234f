"""How alike two videos are: by pixels, by structure, by flicker; over the whole video and at its worst frame.

Videos are [T, 3, H, W] in [0, 1], at least 16 pixels a side. Nothing is downloaded: no measure has learnt weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_DB = 100.0  # what identical videos get in place of infinity
_LUMA = (0.299, 0.587, 0.114)
_WEIGHTS = (0.096, 0.596, 0.289, 0.019)  # of MS-GMSD's scales, from the whole size down
_MASKING, _STABLE = 0.5, 170 / 255**2  # MS-GMSD's alpha and T; T for values in [0, 1]


@dataclass(frozen=True)
class Likeness:
    """A video against its reference.

    `psnr` in dB, of the whole video; `ssim`, 1 if equal; `gmsd`, 0 if equal; the latter two are means over the frames.
    `worst_psnr`, `worst_ssim` and `worst_gmsd` are each of the frame that is furthest from its own. `flicker` is in
    levels of 255, 0 if equal.
    """

    psnr: float
    ssim: float
    gmsd: float
    flicker: float
    worst_psnr: float
    worst_ssim: float
    worst_gmsd: float


def likeness(video: Tensor, reference: Tensor) -> Likeness:
    """All measures of a video; frame by frame, so that memory does not grow with their number."""
    pairs = list(zip(video, reference, strict=True))
    psnrs, ssims, gmsds = ([of(*pair) for pair in pairs] for of in (psnr, ssim, gmsd))
    return Likeness(
        psnr=psnr(video, reference),
        ssim=sum(ssims) / len(ssims),
        gmsd=sum(gmsds) / len(gmsds),
        flicker=flicker(video, reference),
        worst_psnr=min(psnrs),
        worst_ssim=min(ssims),
        worst_gmsd=max(gmsds),
    )


def overall(videos: Sequence[Likeness]) -> Likeness:
    """The means over some videos, and the worst of all frames."""
    worst = {"worst_psnr": min, "worst_ssim": min, "worst_gmsd": max}
    each = {of.name: [getattr(video, of.name) for video in videos] for of in fields(Likeness)}
    return Likeness(**{name: worst.get(name, fmean)(values) for name, values in each.items()})


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values whose peak is 1 against others of any shape, at most `MOST_DB`."""
    error = (images.double() - reference.double()).square().mean().item()
    return MOST_DB if error == 0 else min(MOST_DB, -10 * math.log10(error))


def ssim(images: Tensor, reference: Tensor) -> float:
    """Structural similarity of images [..., H, W] in [0, 1] with others: the mean over images and channels.

    Source: Z. Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with
    their Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, where the window lies inside.
    """
    x, y = (of.double().reshape(-1, 1, *of.shape[-2:]) for of in (images, reference))
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


def gmsd(image: Tensor, reference: Tensor) -> float:
    """Multi-scale gradient magnitude similarity deviation of an image [3, H, W] in [0, 1]; 0 if the edges are equal.

    Source: B. Zhang, P. Sander, A. Bovik, "Gradient Magnitude Similarity Deviation on Multiple Scales for Color Image
    Quality Assessment" (2017), MS-GMSD of the luma with Prewitt's gradients, where they lie inside. Scales at which a
    side has fewer than 3 pixels are left out.
    """
    luma = torch.tensor(_LUMA, dtype=torch.float64, device=image.device).view(3, 1, 1)
    x, y = ((of.double() * luma).sum(0)[None, None] for of in (image, reference))
    total = weights = 0.0
    for weight in _WEIGHTS:
        if min(x.shape[-2:]) < 3:
            break
        a, b = _gradient(x), _gradient(y)
        similarity = ((2 - _MASKING) * a * b + _STABLE) / (a * a + b * b - _MASKING * a * b + _STABLE)
        total += weight * similarity.var(correction=0).item()
        weights += weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return math.sqrt(total / weights)


def _gradient(images: Tensor) -> Tensor:
    """Magnitudes [..., H - 2, W - 2] by Prewitt's filters."""
    kernel = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=images.dtype, device=images.device) / 3
    both = F.conv2d(images, torch.stack([kernel, kernel.T])[:, None])
    return both.square().sum(1).sqrt()


def flicker(video: Tensor, reference: Tensor) -> float:
    """The mean absolute change of the error from one frame to the next, in levels of 255.

    The mean absolute difference of neighbouring frames is the temporal flickering of Z. Huang et al., "VBench:
    Comprehensive Benchmark Suite for Video Generative Models" (2024); of the error it leaves out what moves in both
    videos. A constant error does not flicker.
    """
    error = video.double() - reference.double()
    return 255 * error.diff(dim=0).abs().mean().item() if len(error) > 1 else 0.0
