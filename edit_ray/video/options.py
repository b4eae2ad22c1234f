"""What the writing of video files can be told."""

from typing import Literal

from pydantic import Field

from edit_ray.options import Options

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]


class OutputOptions(Options):
    """Where runs are written, and how libx264 encodes them."""

    directory: str | None = Field(default=None, min_length=1, max_length=4096)
    crf: int = Field(default=18, ge=0, le=51)
    preset: Preset = "medium"
