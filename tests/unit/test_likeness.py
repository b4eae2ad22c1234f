"""Measures of likeness against plain transcriptions of their formulas, and where their values are known."""

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.tuning.likeness import MOST_DB, Likeness, flicker, gmsd, likeness, psnr, ssim


def made(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_psnr_of_equal_videos_and_of_a_known_error():
    assert psnr(made(3, 2, 24, 20), made(3, 2, 24, 20)) == MOST_DB
    assert psnr(torch.full((3, 1, 8, 8), 0.6), torch.full((3, 1, 8, 8), 0.5)) == pytest.approx(20, abs=1e-4)
    assert psnr(torch.full((8,), 1e-9), torch.zeros(8)) == MOST_DB, "and no more"


def test_ssim_of_an_inverted_window_by_hand():
    """In one window of 11 x 11 pixels the weighted moments are sums that can be written down."""
    x = made(11, 11, seed=1)
    y = 1 - x
    weights = torch.tensor([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    weights = weights.double() / weights.double().sum()
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    variance = (weights * (x - mean_x) ** 2).sum()
    expected = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4) * (9e-4 - 2 * variance)
    assert ssim(x, y) == pytest.approx((expected / (2 * variance + 9e-4)).item(), abs=1e-6)


def plain_ssim(x, y):
    """Window by window, in Python's numbers."""
    height, width = x.shape
    line = [math.exp(-(i * i) / (2 * 1.5**2)) for i in range(-5, 6)]
    total = sum(a * b for a in line for b in line)
    found = []
    for row in range(height - 10):
        for column in range(width - 10):
            taken = [
                (line[i] * line[j] / total, x[row + i, column + j].item(), y[row + i, column + j].item())
                for i in range(11)
                for j in range(11)
            ]
            mx, my = sum(w * a for w, a, _ in taken), sum(w * b for w, _, b in taken)
            vx, vy = sum(w * (a - mx) ** 2 for w, a, _ in taken), sum(w * (b - my) ** 2 for w, _, b in taken)
            both = sum(w * (a - mx) * (b - my) for w, a, b in taken)
            above = (2 * mx * my + 1e-4) * (2 * both + 9e-4)
            found.append(above / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)))
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(3))
def test_ssim_is_the_mean_over_windows_channels_and_images(seed):
    x, y = made(2, 3, 14, 13, seed=seed), made(2, 3, 14, 13, seed=seed + 10)
    y = 0.7 * x + 0.3 * y
    each = [plain_ssim(a, b) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
    assert ssim(x, y) == pytest.approx(sum(each) / 6, abs=1e-9)


def plain_gmsd(x, y):
    """Of two RGB images as nested lists [row][column][channel], by the paper's formulas in values of 0 to 255."""

    def luma(image):
        return [[255 * (0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in row] for row in image]

    def gradient(image, row, column):
        at = [[image[row + i][column + j] for j in (-1, 0, 1)] for i in (-1, 0, 1)]
        horizontal = sum(at[i][0] - at[i][2] for i in range(3)) / 3
        vertical = sum(at[0][j] - at[2][j] for j in range(3)) / 3
        return math.hypot(horizontal, vertical)

    def halved(image):
        rows, columns = len(image) // 2, len(image[0]) // 2
        return [
            [sum(image[2 * i + di][2 * j + dj] for di in (0, 1) for dj in (0, 1)) / 4 for j in range(columns)]
            for i in range(rows)
        ]

    x, y, squares, used = luma(x), luma(y), 0.0, 0.0
    for weight in (0.096, 0.596, 0.289, 0.019):
        if min(len(x), len(x[0])) < 3:
            break
        similarities = []
        for row in range(1, len(x) - 1):
            for column in range(1, len(x[0]) - 1):
                a, b = gradient(x, row, column), gradient(y, row, column)
                similarities.append((1.5 * a * b + 170) / (a * a + b * b - 0.5 * a * b + 170))
        mean = sum(similarities) / len(similarities)
        squares += weight * sum((s - mean) ** 2 for s in similarities) / len(similarities)
        used += weight
        x, y = halved(x), halved(y)
    return math.sqrt(squares / used)


@pytest.mark.parametrize("size", [(24, 24), (32, 25), (16, 40), (47, 33)])
@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_gmsd_is_its_formula_at_every_scale_that_fits(size, mixed):
    x, y = made(3, *size), made(3, *size, seed=1)
    y = (1 - mixed) * x + mixed * y
    expected = plain_gmsd(x.permute(1, 2, 0).tolist(), y.permute(1, 2, 0).tolist())
    assert gmsd(x, y) == pytest.approx(expected, abs=1e-12)
    assert gmsd(y, x) == pytest.approx(expected, abs=1e-12)


def test_gmsd_sees_structure_and_not_brightness():
    x = made(3, 32, 32) / 2
    assert gmsd(x + 0.4, x) == pytest.approx(0, abs=1e-9)
    assert gmsd(1 - x, x) == pytest.approx(0, abs=1e-9), "the same edges, in the other direction"
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    noisy = [x + scale * made(3, 32, 32, seed=2) for scale in (0.02, 0.1, 0.3)]
    figures = [gmsd(other, x) for other in noisy]
    assert figures == sorted(figures)
    assert gmsd(blurred, x) > figures[0]


def test_gmsd_of_an_edge_that_is_missing_by_hand():
    """3 x 3 pixels have one gradient, so that nothing deviates; 3 x 4 have two."""
    step = torch.zeros(3, 3, 4, dtype=torch.float64)
    step[:, :, 3] = 1
    flat = torch.zeros_like(step)
    assert gmsd(step[..., :3], flat[..., :3]) == gmsd(step[..., 1:], flat[..., 1:]) == 0
    steep = 1 - 170 / (255**2 + 170)  # beside a gradient of 0 in both: similarities 1 and 1 - steep
    assert gmsd(step, flat) == pytest.approx(steep / 2, abs=1e-12)


@given(st.integers(1, 6), st.floats(-0.5, 0.5), st.floats(0, 0.3))
@settings(max_examples=30, deadline=None)
def test_only_an_error_that_changes_flickers(frames, constant, swing):
    reference = made(frames, 3, 16, 16)
    signs = torch.tensor([(-1.0) ** t for t in range(frames)], dtype=torch.float64).view(-1, 1, 1, 1)
    assert flicker(reference + constant, reference) == pytest.approx(0, abs=1e-9)
    expected = 255 * 2 * swing if frames > 1 else 0
    assert flicker(reference + constant + swing * signs, reference) == pytest.approx(expected, abs=1e-9)


def test_all_measures_of_equal_videos():
    video = made(3, 3, 16, 16)
    expected = asdict(Likeness(MOST_DB, 1, 0, 0, MOST_DB, 1, 0))
    assert asdict(likeness(video, video)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("worst", range(4))
def test_the_worst_frame_stands_beside_the_mean(worst):
    reference, video = made(4, 3, 24, 24), made(4, 3, 24, 24)
    video += 0.02 * made(4, 3, 24, 24, seed=3)
    video[worst] += 0.4 * made(3, 24, 24, seed=4)
    found = likeness(video, reference)
    assert found.psnr == psnr(video, reference)
    assert found.ssim == pytest.approx(ssim(video, reference), abs=1e-12)
    assert found.flicker == flicker(video, reference) > 0
    assert found.gmsd == pytest.approx(sum(map(gmsd, video, reference)) / 4, abs=1e-12)
    frame = video[worst], reference[worst]
    assert (found.worst_psnr, found.worst_ssim, found.worst_gmsd) == (psnr(*frame), ssim(*frame), gmsd(*frame))
    assert found.worst_psnr < found.psnr
    assert found.worst_ssim < found.ssim
    assert found.worst_gmsd > found.gmsd


def test_videos_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="longer"):
        likeness(made(2, 3, 16, 16), made(3, 3, 16, 16))
