"""Frames to H.264 and back, by one ffmpeg process per file (the binary that imageio-ffmpeg brings)."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from edit_ray.video.options import OutputOptions

Frames = npt.NDArray[np.uint8]

# Full-range RGB to what players expect; said in the stream, so that reading it back inverts the same matrix.
_TO_BT709 = "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int"
_BT709 = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv")
# One thread and no version strings: the same frames give the same bytes on every machine.
_REPRODUCIBLE = ("-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1")


class EncodeError(RuntimeError):
    """ffmpeg failed; the message ends with its last words."""


def encode(frames: Frames, path: Path, *, fps: int, options: OutputOptions) -> None:
    """Writes `frames` [F, H, W, 3] as an MP4 whose every frame can be decoded on its own segment's terms.

    No B-frames and a closed group: files of equal shape can be joined without another encoding.
    """
    count, height, width, _ = frames.shape
    _ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"),
        *("-an", "-vf", _TO_BT709, "-pix_fmt", "yuv420p", *_BT709),
        *("-c:v", "libx264", "-preset", options.preset, "-crf", str(options.crf)),
        *("-bf", "0", "-g", str(count), "-sc_threshold", "0", "-video_track_timescale", str(1000 * fps)),
        *(*_REPRODUCIBLE, "-movflags", "+faststart", "-f", "mp4", str(path)),
        given=np.ascontiguousarray(frames).tobytes(),
    )


def join(parts: Sequence[Path], path: Path) -> None:
    """Puts MP4 files made by `encode` behind each other without touching a frame."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
        for part in parts:
            quoted = str(part).replace("'", "'\\''")
            listing.write(f"file '{quoted}'\n")
        listing.flush()
        _ffmpeg(
            *("-f", "concat", "-safe", "0", "-i", listing.name, "-c", "copy", "-fflags", "+bitexact"),
            *("-map_metadata", "-1", "-movflags", "+faststart", "-f", "mp4", str(path)),
        )


def read_frames(path: Path, *, height: int, width: int) -> Frames:
    """All frames of a file as uint8 [F, H, W, 3]."""
    raw = _ffmpeg("-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-")
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, height, width, 3)


def _ffmpeg(*arguments: str, given: bytes | None = None) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EncodeError(f"ffmpeg failed on {arguments[-1]}: {words[0]}")
    return done.stdout
