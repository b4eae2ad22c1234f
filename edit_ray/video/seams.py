"""How visible a join between two segments is, and how far colour and sharpness have drifted: from frames alone.

What matters at a join is not how frames differ but whether they differ there as they do elsewhere. So every measure is
relative to the frames around it. Luma and colours are in [0, 1], luma by BT.709.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from edit_ray.video.encode import PATIENCE, Frames, Patience, read_frames
from edit_ray.video.fragments import Part

RADIUS = 8
"""Frames before and after a join that its score depends on."""

LARGEST_SCORE = 8.0
"""The score of a join at which nothing moves though everything around it does, in place of infinity."""

_STILL = 1e-4  # of full scale: differences far below a grey level are not motion, and would be noise in its ratios
_LEAST_FRAMES = 3  # on each side of a seam
_COLOR_UNIT = 4.0  # grey levels of colour that count as much as twice the motion
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)

Series = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seam:
    """How one place between two frames compares with the frames around it.

    Args:
        jump: the difference of the two frames, as a multiple of the median around. A repeated frame has 0.
        accel: the greatest second difference across the place, as a multiple of the median around. High where motion
            turns or halts.
        color: the step of a channel's mean, in grey levels of 255, beyond its trends before and after.
        sharp: log2 of sharpness after over before; negative where it blurs.
    """

    jump: float
    accel: float
    color: float
    sharp: float

    @property
    def score(self) -> float:
        """The worst of motion, colour and sharpness on a common scale, from 0 (seamless) to `LARGEST_SCORE`."""
        motion = max(abs(math.log2(self.jump)), math.log2(self.accel))
        worst = max(motion, self.color / _COLOR_UNIT, abs(self.sharp))
        return min(LARGEST_SCORE, worst)


@dataclass(frozen=True)
class Appearance:
    """Mean colour of a stretch of frames, in grey levels of 255, and log2 of its sharpness."""

    red: float
    green: float
    blue: float
    sharpness: float

    def drift(self, later: Appearance) -> tuple[float, float]:
        """How far `later` differs: grey levels of the channel that changed most, and log2 of sharpness."""
        changes = (later.red - self.red, later.green - self.green, later.blue - self.blue)
        return max(map(abs, changes)), later.sharpness - self.sharpness


@dataclass(frozen=True)
class FrameSeries:
    """What the scores need to know of n frames, one value per frame.

    `change[t]` is mean |x_t - x_{t-1}|, `bend[t]` is mean |x_{t+1} - 2 x_t + x_{t-1}| (NaN where a frame is missing),
    `colors` [n, 3] are the channels' means, `energy[t]` is the mean square of the luma's Laplacian.
    """

    change: Series
    bend: Series
    colors: Series
    energy: Series

    @classmethod
    def of(cls, frames: npt.NDArray[np.uint8]) -> Self:
        """Measure uint8 frames [F, H, W, 3], one after the other."""
        count = len(frames)
        change, bend, energy = (np.full(count, math.nan) for _ in range(3))
        colors = np.empty((count, 3))
        step: npt.NDArray[np.float32] | None = None
        before: npt.NDArray[np.float32] | None = None
        for index, frame in enumerate(frames):
            luma = frame @ _LUMA / np.float32(255)
            colors[index] = frame.mean(axis=(0, 1), dtype=np.float64) / 255
            energy[index] = np.mean(_laplacian(luma) ** 2)
            if before is not None:
                last, step = step, luma - before
                change[index] = np.mean(np.abs(step))
                if last is not None:
                    bend[index - 1] = np.mean(np.abs(step - last))
            before = luma
        return cls(change, bend, colors, energy)

    def __len__(self) -> int:
        return len(self.change)

    def seam(self, boundary: int) -> Seam:
        """The seam between frames `boundary - 1` and `boundary`, by up to `RADIUS` frames on each side.

        Raises ValueError if there are fewer than 3 frames on a side.
        """
        first, end = max(0, boundary - RADIUS), min(len(self), boundary + RADIUS)
        if min(boundary - first, end - boundary) < _LEAST_FRAMES:
            raise ValueError(f"a seam at frame {boundary} of {len(self)} has fewer than 3 frames on a side")
        across = [boundary - 1, boundary]
        others = [t for t in range(first + 1, end - 1) if t not in across]
        around = [t for t in range(first + 1, end) if t != boundary]
        before, after = slice(first, boundary), slice(boundary, end)
        return Seam(
            jump=_ratio(float(self.change[boundary]), float(np.median(self.change[around]))),
            accel=_ratio(float(self.bend[across].max()), float(np.median(self.bend[others]))),
            color=255 * float(np.abs(self._trend(after, boundary) - self._trend(before, boundary)).max()),
            sharp=_sharpness(self.energy[after]) - _sharpness(self.energy[before]),
        )

    def interior_score(self) -> float | None:
        """The mean score of all places with `RADIUS` frames on both sides; None where there is none."""
        places = range(RADIUS, len(self) - RADIUS + 1)
        return float(np.mean([self.seam(place).score for place in places])) if places else None

    def appearance(self) -> Appearance:
        """Mean colour and sharpness."""
        red, green, blue = (255 * self.colors.mean(axis=0)).tolist()
        return Appearance(red, green, blue, _sharpness(self.energy))

    def _trend(self, frames: slice, boundary: int) -> Series:
        """Each channel's mean where the two frames meet, by the straight line through these frames."""
        times = np.arange(frames.start, frames.stop) - (boundary - 0.5)
        _slope, value = np.polyfit(times, self.colors[frames], 1)
        return np.asarray(value, np.float64)


def _laplacian(luma: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    inner = luma[1:-1, 1:-1]
    return luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner


def _ratio(value: float, usual: float) -> float:
    return (value + _STILL) / (usual + _STILL)


def _sharpness(energy: Series) -> float:
    return math.log2(float(energy.mean()) + _STILL**2)


class Joins:
    """Measures segments in order, run by run, in the frames that are encoded.

    Where this process has not made the segment before, both sides of the seam are read from their files, so that raw
    frames are never compared with encoded ones.
    """

    def __init__(self) -> None:
        self._tails: dict[str, tuple[Part, Frames]] = {}  # by run: its last segment's last frames

    def measure(
        self, run_id: str, folder: Path, part: Part, before: Part | None, frames: Frames, patience: Patience = PATIENCE
    ) -> dict[str, float]:
        """Statistics of a segment of `frames` [F, H, W, 3]: `red`, `green`, `blue`, `sharpness` (see `Appearance`).

        If it has places with `RADIUS` frames on both sides, `interior_score` is their mean score. If there is a segment
        before and both have frames enough, there are those of the seam: `seam_jump`, `seam_accel`, `seam_color`,
        `seam_sharp`, `seam_score`. Raises EncodeError where a file cannot be read.
        """
        series = FrameSeries.of(frames)
        found = vars(series.appearance()).copy()
        if (interior := series.interior_score()) is not None:
            found["interior_score"] = interior
        known, tail = self._tails.get(run_id, (None, frames))
        self._tails[run_id] = part, frames[-RADIUS:].copy()
        if before is None:
            return found
        if known != before:
            height, width = frames.shape[1:3]
            tail, frames = (
                read_frames(folder / of.path, init=folder / "init.mp4", height=height, width=width, patience=patience)
                for of in (before, part)
            )
        sides = tail[-RADIUS:], frames[:RADIUS]
        if min(map(len, sides)) >= _LEAST_FRAMES:
            seam = FrameSeries.of(np.concatenate(sides)).seam(len(sides[0]))
            found |= {f"seam_{name}": value for name, value in (*vars(seam).items(), ("score", seam.score))}
        return found

    def forget(self, run_id: str) -> None:
        """Free what is kept of a run."""
        self._tails.pop(run_id, None)
