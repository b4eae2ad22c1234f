"""Makes the picture of the README from the video that `make demo` has made: `python docs/demo_gif.py VIDEO`."""

from __future__ import annotations

import argparse
from pathlib import Path

from edit_ray.video.encode import ffmpeg

PICTURE = Path(__file__).resolve().parent / "demo.gif"
FPS, HEIGHT, COLOURS = 10, 192, 128


def make_gif(video: Path, picture: Path) -> None:
    """The whole video as a GIF that repeats for ever, with a palette of its own."""
    frames = f"fps={FPS},scale=-2:{HEIGHT}:flags=lanczos"
    palette = f"split[a][b];[a]palettegen=max_colors={COLOURS}[c];[b][c]paletteuse=dither=bayer:bayer_scale=4"
    ffmpeg("-i", str(video), "-filter_complex", f"{frames},{palette}", "-loop", "0", str(picture), subject=picture.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path, help="final.mp4 of the run")
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args()
    make_gif(given.video, given.output)
