"""What the writing of video files can be told."""

from typing import Literal

from pydantic import Field

from edit_ray.options import Options

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]


class OutputOptions(Options):
    """Where runs are written, how libx264 encodes them, and how many of the latest segments' files stay (None: all)."""

    directory: str | None = Field(default=None, min_length=1, max_length=4096)
    crf: int = Field(default=18, ge=0, le=51)
    preset: Preset = "medium"
    keep_segments: int | None = Field(default=None, ge=1, le=100_000)
