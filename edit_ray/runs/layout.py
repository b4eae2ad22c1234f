"""Which frames of the long video belong to which segment: pure arithmetic, the same wherever it is asked."""

import math
from dataclasses import dataclass

from edit_ray.runs.numbers import Count

TEMPORAL_FACTOR = 4
"""Frames that one latent stands for; the first latent of a clip stands for a single frame."""

_ROUNDING = 1e-6
"""Seconds times frames a second carries binary rounding; this far from a whole frame means on it."""


@dataclass(frozen=True)
class FrameLayout:
    """The frames that each segment adds to the video.

    Args:
        num_frames: frames that a segment denoises, F = 4k+1.
        history_latents: latents a segment takes over from its predecessor, 0 where segments stand alone. With k of
            T latents taken over, a later segment adds 4·(T − k) frames; with none every segment adds F.
        fps: frames a second.

    Raises:
        ValueError: a number out of its range.
    """

    num_frames: Count
    history_latents: Count
    fps: float
    init_latents: Count = 0
    denoise_needs_frames: bool = False

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.num_frames % TEMPORAL_FACTOR != 1:
            raise ValueError(f"num_frames is {self.num_frames}; it must be 4k+1, such as 33 or 81.")
        for name in ("history_latents", "init_latents"):
            if not 0 <= getattr(self, name) < self.latent_frames:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 and less than the "
                    f"{self.latent_frames} latents of a segment of {self.num_frames} frames."
                )
        if not 1 <= self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}; it must be at least 1 and at most 1000.")

    @property
    def latent_frames(self) -> int:
        """Latents of one segment along time, T."""
        return (self.num_frames - 1) // TEMPORAL_FACTOR + 1

    @property
    def first_frames(self) -> int:
        """Frames that the first segment adds."""
        return self.num_frames if self.init_latents == 0 else TEMPORAL_FACTOR * (self.latent_frames - self.init_latents)

    @property
    def later_frames(self) -> int:
        """Frames that each segment after the first adds."""
        if self.history_latents == 0:
            return self.num_frames
        return TEMPORAL_FACTOR * (self.latent_frames - self.history_latents)

    def frames_of(self, segment_index: int) -> int:
        """Frames that the segment adds to the video."""
        self._check_index(segment_index)
        return self.first_frames if segment_index == 0 else self.later_frames

    def first_frame(self, segment_index: int) -> int:
        """Index in the video of the first frame that the segment adds."""
        self._check_index(segment_index)
        return self.total_frames(segment_index)

    def first_latent(self, segment_index: int) -> int:
        """Index in the run's latent stream of the first latent that the segment adds."""
        self._check_index(segment_index)
        later = self.latent_frames - self.history_latents
        return self.init_latents if segment_index == 0 else self.latent_frames + (segment_index - 1) * later

    def total_frames(self, num_segments: int) -> int:
        """Frames of a video of that many segments."""
        self._check_index(num_segments)
        return 0 if num_segments == 0 else self.first_frames + (num_segments - 1) * self.later_frames

    def segments_for(self, duration_s: float) -> int:
        """The fewest segments, at least one, whose frames last `duration_s` seconds."""
        frames = math.ceil(duration_s * self.fps - _ROUNDING)
        return 1 + max(0, math.ceil((frames - self.first_frames) / self.later_frames))

    def frame_at(self, second: float) -> int:
        """Index of the frame that is shown at that second."""
        return math.floor(second * self.fps + _ROUNDING)

    def segment_at(self, second: float) -> int:
        """Index of the segment that adds the frame shown at that second."""
        if second < 0:
            raise ValueError(f"second is {second}; it must be at least 0.")
        frame = self.frame_at(second)
        return 0 if frame < self.first_frames else 1 + (frame - self.first_frames) // self.later_frames

    @staticmethod
    def _check_index(index: int) -> None:
        if index < 0:
            raise ValueError(f"a segment's index or number is {index}; it must be at least 0.")
