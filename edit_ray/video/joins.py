"""What each segment looks like and how well it joins the one before, in the frames that viewers see."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edit_ray.video.encode import PATIENCE, Frames, Patience, read_frames
from edit_ray.video.seam import RADIUS, FrameSeries
from edit_ray.video.stream_files import Part

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
