"""Frames to H.264 and back, by one ffmpeg process per file (the binary that imageio-ffmpeg brings)."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edit_ray.files import read_bytes
from edit_ray.options import Options
from edit_ray.video.fragments import frames_in, split

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]


class OutputOptions(Options):
    """Where runs are written, how libx264 encodes them, and how many of the latest segments' files stay (None: all)."""

    directory: str | None = Field(default=None, min_length=1, max_length=4096)
    crf: int = Field(default=18, ge=0, le=51)
    preset: Preset = "medium"
    keep_segments: int | None = Field(default=None, ge=1, le=100_000)


Frames = npt.NDArray[np.uint8]

# Full-range RGB to what players expect; tagged in the stream, so that reading it back inverts the same matrix.
_TO_BT709 = "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int"
_BT709 = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv")
# x264's own tags: of the options above only matrix and range reach it.
_TAGS = ("-x264-params", "colorprim=bt709:transfer=bt709:colormatrix=bt709")
# One thread and no version strings: the same frames give the same bytes on every machine.
_REPRODUCIBLE = ("-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1")
# One fragment behind its init and no index, at the time that its frames have in the video.
_FRAGMENT = (
    *("-fps_mode", "passthrough", "-avoid_negative_ts", "disabled", "-f", "mp4"),
    *("-movflags", "+frag_keyframe+empty_moov+default_base_moof+frag_discont+skip_trailer"),
)

CHECKS = 5  # of whether an ffmpeg works, within its timeout


class EncodeError(RuntimeError):
    """ffmpeg failed; the message ends with its last line of output."""


class EncoderKilled(EncodeError):
    """A signal ended ffmpeg."""


@dataclass(frozen=True)
class Patience:
    """An ffmpeg that is idle for `timeout_s` is killed; `working` is called regularly while it works.

    The time is counted in checks, so that a process that was itself suspended does not kill its ffmpeg on waking up.
    """

    timeout_s: float = 600.0
    working: Callable[[], None] = lambda: None


PATIENCE = Patience()


def time_scale(fps: float) -> tuple[int, int]:
    """Ticks per second and ticks per frame; exact, also where `fps` only approximates 24000/1001 frames a second."""
    rate = Fraction(fps).limit_denominator(1001)
    return (1000 * rate.numerator, 1000) if rate.denominator == 1 else (rate.numerator, rate.denominator)


def encode(
    frames: Frames,
    *,
    fps: float,
    options: OutputOptions,
    number: int = 0,
    first_frame: int = 0,
    init: bytes | None = None,
    patience: Patience = PATIENCE,
) -> bytes:
    """Encode `frames`, uint8 [F, H, W, 3], as fragment `number` (from 0) of an MP4; return its init and the fragment.

    All fragments of a run have the same init. `first_frame` is the fragment's position in the video. With the `init` of
    earlier fragments, runs begun before primaries and transfer were tagged continue without tags. No B-frames and a
    closed group of pictures. Raises EncodeError, also when ffmpeg dies, hangs or loses a frame.
    """
    count, height, width, _ = frames.shape
    second, frame = time_scale(fps)
    raw, data = np.ascontiguousarray(frames).tobytes(), b""
    for tags in (_TAGS, ()):
        data = ffmpeg(
            *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{second}/{frame}", "-i", "-"),
            *("-an", "-vf", f"{_TO_BT709},setpts=PTS+{first_frame}", "-pix_fmt", "yuv420p", *_BT709),
            *("-c:v", "libx264", *tags, "-preset", options.preset, "-crf", str(options.crf), "-bf", "0"),
            # x264 describes a video of key frames only otherwise, and the init must not depend on the frame count.
            *("-g", str(max(count, 2)), "-sc_threshold", "0", "-video_track_timescale", str(second)),
            *(*_REPRODUCIBLE, "-fragment_index", str(number + 1), *_FRAGMENT, "-"),
            stdin=[raw],
            subject=f"{count} frames",
            patience=patience,
        )
        try:
            _, fragment = split(data)
        except ValueError as broken:
            raise EncodeError(f"ffmpeg wrote something else than one fragment: {broken}") from None
        if (written := frames_in(fragment)) != count:
            raise EncodeError(f"ffmpeg was given {count} frames and encoded {written}")
        if init is None or data.startswith(init):
            break
    return data


def join(init: Path, parts: Sequence[Path], path: Path, *, comment: str = "", patience: Patience = PATIENCE) -> None:
    """Write an ordinary MP4 of fragments in order, without encoding a frame again; `comment` becomes its metadata.

    Raises EncodeError, OSError, such as on a full disk.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as metadata:
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
        metadata.write(f";FFMETADATA1\ncomment={escaped}\n")
        metadata.flush()
        ffmpeg(
            *("-i", "-", "-f", "ffmetadata", "-i", metadata.name, "-map", "0", "-map_metadata", "1", "-c", "copy"),
            *("-fflags", "+bitexact", "-movflags", "+faststart", "-f", "mp4", str(path)),
            stdin=(read_bytes(file) for file in (init, *parts)),
            subject=path.name,
            patience=patience,
        )


def read_frames(
    path: Path, *, height: int, width: int, init: Path | None = None, patience: Patience = PATIENCE
) -> Frames:
    """All frames of a video as uint8 [F, H, W, 3]; a fragment alone is read behind its `init`. Raises EncodeError."""
    decode = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-")
    source, stdin = (str(path), []) if init is None else ("-", [init.read_bytes(), path.read_bytes()])
    raw = ffmpeg("-i", source, *decode, stdin=stdin, subject=path.name, patience=patience)
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, height, width, 3)


@cache
def ffmpeg_version() -> str:
    """The version that ffmpeg reports of itself, such as `7.0.2-static`; `unknown` where it reports none."""
    try:
        match = re.match(rb"ffmpeg version (\S+)", ffmpeg("-version", subject="its version", patience=Patience(60)))
    except EncodeError:
        match = None
    return match[1].decode(errors="replace") if match else "unknown"


def ffmpeg(*arguments: str, subject: str, stdin: Iterable[bytes] = (), patience: Patience = PATIENCE) -> bytes:
    """Run ffmpeg with these pieces as its standard input; return its standard output.

    Raises EncodeError with `subject` in the message, EncoderKilled, OSError where the disk is full.
    """
    import imageio_ffmpeg  # here, because denoising alone does not need it

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *arguments]
    # Its output is kept in memory files, so that nothing has to be read while its input is written.
    with open(os.memfd_create("stdout"), "w+b") as output, open(os.memfd_create("stderr"), "w+b") as log:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=log) as process:
            assert process.stdin is not None
            with watched(process, subject, patience):
                try:
                    with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit code says why
                        for data in stdin:
                            process.stdin.write(data)
                except BaseException:
                    process.kill()
                    raise
                finally:
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.close()
                process.wait()
        log.seek(0)
        _check(process.returncode, log.read(), subject)
        output.seek(0)
        return output.read()


@contextlib.contextmanager
def watched(process: subprocess.Popen[bytes], subject: str, patience: Patience) -> Iterator[None]:
    """Bound the wait for the process inside it. Raises EncodeError where the process was idle and had to be killed."""
    ended, hung = threading.Event(), threading.Event()

    def watch() -> None:
        idle, before = 0, b""
        while idle < CHECKS:
            if ended.wait(patience.timeout_s / CHECKS):
                return
            now = _activity_of(process.pid)
            idle = idle + 1 if now == before else 0
            if not idle:
                patience.working()
            before = now
        hung.set()
        process.kill()

    watcher = threading.Thread(target=watch, name="ffmpeg", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    if hung.is_set():
        raise EncodeError(
            f"ffmpeg did nothing for {patience.timeout_s:g} s while it worked on {subject}; it was killed"
        )


def _activity_of(pid: int) -> bytes:
    """Counters that change whenever a process computes, reads or writes. Where they are unknown it counts as active."""
    folder = Path(f"/proc/{pid}")
    try:
        times = (folder / "stat").read_bytes().rpartition(b")")[2].split()[11:13]
        return b" ".join([*times, (folder / "io").read_bytes()])
    except OSError:
        return str(time.monotonic()).encode()


def _check(code: int, log: bytes, subject: str) -> None:
    if code < 0:
        raise EncoderKilled(f"ffmpeg was killed by signal {-code} while it worked on {subject}")
    if code:
        if os.strerror(errno.ENOSPC).encode() in log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), subject)
        words = log.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {code}"]
        raise EncodeError(f"ffmpeg failed on {subject}: {words[0]}")
