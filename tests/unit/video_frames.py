"""Test pictures whose number can be read from their pixels, and the ffmpeg that reads them."""

import subprocess

import imageio_ffmpeg
import numpy as np

BITS = 12
HEIGHT, WIDTH = 16, 8 * BITS
FRAME_BYTES = HEIGHT * WIDTH * 3
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def numbered(first: int, count: int) -> np.ndarray:
    """Frames [count, H, W, 3], each of which shows its number as bars: white for 1, black for 0."""
    numbers = np.arange(first, first + count)
    bits = numbers[:, None] >> np.arange(BITS) & 1
    row = np.repeat(bits.astype(np.uint8) * 255, WIDTH // BITS, axis=1)
    return np.broadcast_to(row[:, None, :, None], (count, HEIGHT, WIDTH, 3)).copy()


def numbers_in(raw: bytes) -> list[int]:
    """The numbers that raw frames show. Fails on a bar that is neither black nor white."""
    frames = np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, BITS, WIDTH // BITS, 3).mean(axis=(1, 3, 4))
    assert ((frames < 64) | (frames > 192)).all(), "every bar can be read"
    return [int(value) for value in (frames > 128) @ (1 << np.arange(BITS))]


def reading(source, *options: str) -> list[str]:
    """The command that writes all frames of `source` to its standard output, as they come."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-")
    return [FFMPEG, "-loglevel", "error", "-nostdin", "-threads", "1", *options, "-i", str(source), *raw]


def shown_by(source, *options: str) -> list[int]:
    """The numbers of the frames of a file, as ffmpeg plays it; it must have nothing to complain of."""
    done = subprocess.run(reading(source, *options), capture_output=True, check=True)
    assert done.stderr == b""
    return numbers_in(done.stdout)
