"""How visible a join between two segments is, and how far colour and sharpness have drifted: from frames alone.

At a join what matters is not how frames differ but whether they differ there as they do elsewhere; so every figure is
relative to the frames around. Luma and colours are in [0, 1], luma by BT.709.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from edit_ray.video.encode import PATIENCE, Frames, Patience, read_frames
from edit_ray.video.hls import Part

RADIUS = 8
"""Frames before and after a join that its score looks at."""

LARGEST_SCORE = 8.0
"""Of a join at which nothing moves though everything around does, whose score would be infinite."""

_STILL = 1e-4  # of full scale: differences far below a grey level are no motion, in ratios of which they would be noise
_COLOR_UNIT = 4.0  # grey levels of colour that count as much as twice the motion
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)

Series = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seam:
    """The figures of one place between two frames.

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
        """The worst of them on a common scale, 0 (seamless) to `LARGEST_SCORE`."""
        motion = max(abs(math.log2(self.jump)), math.log2(self.accel))
        worst = max(motion, self.color / _COLOR_UNIT, abs(self.sharp))
        return min(LARGEST_SCORE, worst)


@dataclass(frozen=True)
class Look:
    """Mean colour of a stretch of frames, in grey levels of 255, and log2 of its sharpness."""

    red: float
    green: float
    blue: float
    sharpness: float

    def drift(self, later: Look) -> tuple[float, float]:
        """How far `later` is from here: grey levels of the channel that changed most, and log2 of sharpness."""
        changes = (later.red - self.red, later.green - self.green, later.blue - self.blue)
        return max(map(abs, changes)), later.sharpness - self.sharpness


@dataclass(frozen=True)
class FrameSeries:
    """What the scores need of n frames, one value a frame.

    `change[t]` is mean |x_t - x_{t-1}|, `bend[t]` is mean |x_{t+1} - 2 x_t + x_{t-1}| (NaN where a frame is missing),
    `colors` [n, 3] are the channels' means, `energy[t]` is the mean square of the luma's Laplacian.
    """

    change: Series
    bend: Series
    colors: Series
    energy: Series

    @classmethod
    def of(cls, frames: npt.NDArray[np.uint8]) -> Self:
        """Measures uint8 frames [F, H, W, 3], one after the other."""
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
        """The figures between frames `boundary - 1` and `boundary`, by up to `RADIUS` frames on each side.

        Raises ValueError if there are fewer than 3 frames on a side.
        """
        first, end = max(0, boundary - RADIUS), min(len(self), boundary + RADIUS)
        if boundary - first < 3 or end - boundary < 3:
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

    def interior_score(self, start: int) -> float | None:
        """The mean score at places within the frames from `start` on; None where there is none with whole sides."""
        places = range(start + RADIUS, len(self) - RADIUS + 1)
        return float(np.mean([self.seam(place).score for place in places])) if places else None

    def look(self, start: int) -> Look:
        """Mean colour and sharpness of the frames from `start` on."""
        red, green, blue = (255 * self.colors[start:].mean(axis=0)).tolist()
        return Look(red, green, blue, _sharpness(self.energy[start:]))

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


_LEAST_FRAMES = 3  # on each side of a seam


class Joins:
    """Measures written segments in order, run by run.

    It reads the media, not what was encoded, so that a segment has the same figures whether or not the process that
    measures it has made its predecessor.
    """

    def __init__(self) -> None:
        self._tails: dict[str, tuple[Part, Frames]] = {}  # by run: its last segment's last frames

    def measure(
        self,
        run_id: str,
        folder: Path,
        part: Part,
        before: Part | None,
        *,
        height: int,
        width: int,
        patience: Patience = PATIENCE,
    ) -> dict[str, float]:
        """Figures of a segment: `red`, `green`, `blue`, `sharpness` (see `Look`), `interior_score`, and of its seam.

        The seam's (`seam_jump`, `seam_accel`, `seam_color`, `seam_sharp`, `seam_score`) are there if there is a segment
        before and both have frames enough, `interior_score`, the mean score of places inside it, if it has. Raises
        EncodeError where media cannot be read.
        """
        size = {"height": height, "width": width}
        tail = self._tail(run_id, folder, before, **size)
        frames = read_frames(folder / part.path, init=folder / "init.mp4", **size, patience=patience)
        self._tails[run_id] = (part, frames[-RADIUS:].copy())
        series, start = FrameSeries.of(np.concatenate([tail, frames])), len(tail)
        look = series.look(start)
        figures = {"red": look.red, "green": look.green, "blue": look.blue, "sharpness": look.sharpness}
        interior = series.interior_score(start)
        if interior is not None:
            figures["interior_score"] = interior
        if min(start, len(frames)) >= _LEAST_FRAMES:
            seam = series.seam(start)
            figures |= {f"seam_{name}": getattr(seam, name) for name in ("jump", "accel", "color", "sharp", "score")}
        return figures

    def forget(self, run_id: str) -> None:
        """Frees what is kept of a run."""
        self._tails.pop(run_id, None)

    def _tail(self, run_id: str, folder: Path, before: Part | None, *, height: int, width: int) -> Frames:
        if before is None:
            return np.empty((0, height, width, 3), np.uint8)
        known, tail = self._tails.get(run_id, (None, None))
        if known == before and tail is not None:
            return tail
        return read_frames(folder / before.path, init=folder / "init.mp4", height=height, width=width)[-RADIUS:]
