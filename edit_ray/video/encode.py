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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edit_ray.files import read_bytes
from edit_ray.options import Options
from edit_ray.video.fragments import read_fragment, split, time_scale

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

# Full-range RGB to what players expect; said in the stream, so that reading it back inverts the same matrix.
_TO_BT709 = "scale=in_range=full:out_range=tv:out_color_matrix=bt709:flags=accurate_rnd+full_chroma_int"
_BT709 = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv")
# What x264 writes of it: of the options above only matrix and range reach it.
_TAGS = ("-x264-params", "colorprim=bt709:transfer=bt709:colormatrix=bt709")
# One thread and no version strings: the same frames give the same bytes on every machine.
_REPRODUCIBLE = ("-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1")


LOOKS = 5  # at an ffmpeg, in the time that it may do nothing


class EncodeError(RuntimeError):
    """ffmpeg failed; the message ends with its last words."""


class EncoderKilled(EncodeError):
    """A signal ended ffmpeg."""


@dataclass(frozen=True)
class Patience:
    """An ffmpeg that does nothing for `timeout_s` is killed; `working` is called again and again while it works.

    The time is counted in looks, so that a process that was stopped itself, and starts again, kills nobody.
    """

    timeout_s: float = 600.0
    working: Callable[[], None] = lambda: None


PATIENCE = Patience()


def encode(
    frames: Frames, *, fps: float, options: OutputOptions, init: bytes | None = None, patience: Patience = PATIENCE
) -> bytes:
    """`frames` [F, H, W, 3] as a fragmented MP4 of a single fragment, which plays by itself.

    No B-frames and a closed group of pictures. `init` is that of the fragments before it, if there are any: those of a
    run that was begun without tags for primaries and transfer are followed by one without. Raises EncodeError, also
    when ffmpeg dies, hangs or loses a frame: what it has written by then is never returned.
    """
    data = _encode(frames, _TAGS, patience, fps=fps, options=options)
    if init is not None and not data.startswith(init):
        untagged = _encode(frames, (), patience, fps=fps, options=options)
        return untagged if untagged.startswith(init) else data
    return data


def _encode(frames: Frames, tags: Sequence[str], patience: Patience, *, fps: float, options: OutputOptions) -> bytes:
    count, height, width, _ = frames.shape
    # x264 describes a video of key frames alone otherwise, and the init must not depend on the number of frames.
    group = max(count, 2)
    second, frame = time_scale(fps)
    data = _ffmpeg(
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{second}/{frame}", "-i", "-"),
        *("-an", "-vf", _TO_BT709, "-pix_fmt", "yuv420p", *_BT709),
        *("-c:v", "libx264", *tags, "-preset", options.preset, "-crf", str(options.crf)),
        *("-bf", "0", "-g", str(group), "-sc_threshold", "0", "-video_track_timescale", str(second)),
        *(*_REPRODUCIBLE, "-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-f", "mp4", "-"),
        given=np.ascontiguousarray(frames).tobytes(),
        subject=f"{count} frames",
        patience=patience,
    )
    try:
        written = read_fragment(split(data)[1])
    except ValueError as broken:
        raise EncodeError(f"ffmpeg wrote something else than one fragment: {broken}") from None
    if (written.num_frames, written.frame_ticks) != (count, frame):
        raise EncodeError(f"ffmpeg was given {count} frames and encoded {written.num_frames}, or timed them otherwise")
    return data


def join(init: Path, parts: Sequence[Path], path: Path, *, comment: str = "", patience: Patience = PATIENCE) -> None:
    """Writes an ordinary MP4 of placed fragments in order, without touching a frame; `comment` becomes its metadata.

    Raises EncodeError, OSError, such as on a full disk.
    """
    with (
        tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as metadata,
        tempfile.TemporaryFile() as said,
    ):
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
        metadata.write(f";FFMETADATA1\ncomment={escaped}\n")
        metadata.flush()
        command = _command(
            *("-i", "-", "-f", "ffmetadata", "-i", metadata.name, "-map", "0", "-map_metadata", "1", "-c", "copy"),
            *("-fflags", "+bitexact", "-movflags", "+faststart", "-f", "mp4", str(path)),
        )
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said) as process:
            assert process.stdin is not None
            with _watched(process, path.name, patience):
                try:
                    with contextlib.suppress(BrokenPipeError):  # it has ended, and its exit code tells why
                        for file in (init, *parts):
                            process.stdin.write(read_bytes(file))
                except BaseException:
                    process.kill()
                    raise
                finally:
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.close()
                process.wait()
        said.seek(0)
        _check(process.returncode, said.read(), path.name)


def read_frames(
    path: Path, *, height: int, width: int, init: Path | None = None, patience: Patience = PATIENCE
) -> Frames:
    """All frames of a video as uint8 [F, H, W, 3]; a fragment alone is read behind its `init`. Raises EncodeError."""
    decode = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-")
    given = None if init is None else init.read_bytes() + path.read_bytes()
    source = str(path) if given is None else "-"
    raw = _ffmpeg("-i", source, *decode, given=given, subject=path.name, patience=patience)
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, height, width, 3)


@cache
def ffmpeg_version() -> str:
    """Of the ffmpeg that encodes, as it says itself, such as `7.0.2-static`."""
    said = subprocess.run(_command("-version"), capture_output=True, check=False).stdout
    match = re.match(rb"ffmpeg version (\S+)", said)
    return match[1].decode(errors="replace") if match else "unknown"


def _command(*arguments: str) -> list[str]:
    import imageio_ffmpeg  # here, because denoising alone needs none of it

    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-y", *arguments]


def _ffmpeg(*arguments: str, subject: str, given: bytes | None, patience: Patience) -> bytes:
    stdin, piped = None if given is None else subprocess.PIPE, subprocess.PIPE
    with subprocess.Popen(_command(*arguments), stdin=stdin, stdout=piped, stderr=piped) as process:
        try:
            with _watched(process, subject, patience):
                written, said = process.communicate(given)
        except BaseException:
            process.kill()
            raise
    _check(process.returncode, said, subject)
    return written


@contextlib.contextmanager
def _watched(process: subprocess.Popen[bytes], subject: str, patience: Patience) -> Iterator[None]:
    """Whoever waits for the process meanwhile does not wait for ever. Raises EncodeError where it hung."""
    ended, hung = threading.Event(), threading.Event()

    def watch() -> None:
        silent, before = 0, b""
        while silent < LOOKS:
            if ended.wait(patience.timeout_s / LOOKS):
                return
            now = _work_of(process.pid)
            silent = silent + 1 if now == before else 0
            if not silent:
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


def _work_of(pid: int) -> bytes:
    """What changes whenever a process computes, reads or writes: its CPU time and bytes. Unknown work is work."""
    folder = Path(f"/proc/{pid}")
    try:
        times = (folder / "stat").read_bytes().rpartition(b")")[2].split()[11:13]
        return b" ".join([*times, (folder / "io").read_bytes()])
    except OSError:
        return str(time.monotonic()).encode()


def _check(code: int, said: bytes, subject: str) -> None:
    if code < 0:
        raise EncoderKilled(f"ffmpeg was killed by signal {-code} while it worked on {subject}")
    if code:
        words = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {code}"]
        if os.strerror(errno.ENOSPC).encode() in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), subject)
        raise EncodeError(f"ffmpeg failed on {subject}: {words[0]}")
