"""The user's picture or clip, as the frames that a run begins from."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import deque

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from edit_ray.engine.options import is_clip
from edit_ray.errors import ConfigError
from edit_ray.video.encode import EncodeError, Patience, watched

MAX_PIXELS = 2**26  # of a picture, or of a frame of a clip
MAX_CLIP_FRAMES = 100_000
_PATIENCE = Patience()

Frames = npt.NDArray[np.uint8]

# The formats of `is_clip`'s names; others, such as playlists, could make ffmpeg open other files.
_FORMATS = "mov,matroska,avi,gif"


def read_init(path: str, *, frames: int, height: int, width: int) -> Frames:
    """The picture, or the last `frames` frames of the clip, as uint8 [F, H, W, 3].

    Scaled in proportion until they cover `height` and `width`, and cut around the middle. A picture's transparent parts
    are black. Raises `ConfigError`, which says what is wrong with the file.
    """
    if not os.path.isfile(path):
        raise _unusable(path, "is no file here")
    if is_clip(path):
        return _read_clip(path, frames, height, width)
    return _read_picture(path, height, width)[None]


def _unusable(path: str, why: str) -> ConfigError:
    return ConfigError([f"continuity.init is {path!r}, which {why}."])


def _read_picture(path: str, height: int, width: int) -> Frames:
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
            size = picture.size
            if size[0] * size[1] <= MAX_PIXELS:
                upright = ImageOps.exif_transpose(picture).convert("RGBA")
                opaque = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright).convert("RGB")
                return np.asarray(ImageOps.fit(opaque, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:  # a broken file makes Pillow's readers raise anything
        said = str(error).replace(repr(path), "the file")
        raise _unusable(path, f"cannot be read as a picture ({said})") from None
    raise _unusable(path, f"has {size[0]}x{size[1]} pixels; a picture must have at most {MAX_PIXELS}")


def _read_clip(path: str, frames: int, height: int, width: int) -> Frames:
    import imageio_ffmpeg  # here, because few runs begin from a clip

    cover = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=lanczos+accurate_rnd+full_chroma_int"
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-nostdin", "-xerror"),
        *("-protocol_whitelist", "file", "-format_whitelist", _FORMATS, "-max_pixels", str(MAX_PIXELS)),
        *("-i", f"file:{path}", "-map", "0:v:0", "-vf", f"{cover},crop={width}:{height}", "-fps_mode", "passthrough"),
        *("-frames:v", str(MAX_CLIP_FRAMES + 1), "-pix_fmt", "rgb24", "-f", "rawvideo", "-"),
    ]
    size, count, last = height * width * 3, 0, deque[bytes](maxlen=frames)
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
        assert process.stdout is not None
        try:
            with watched(process, "the clip", _PATIENCE):
                while len(frame := process.stdout.read(size)) == size:
                    last.append(frame)
                    count += 1
                process.wait()
        except EncodeError as hung:
            raise _unusable(path, f"cannot be read as a clip ({hung})") from None
        said.seek(0)
        words = said.read(10_000).decode(errors="replace").strip().splitlines()
    if process.returncode or not count:
        raise _unusable(path, f"cannot be read as a clip ({words[-1] if words else 'it has no frames'})")
    if count > MAX_CLIP_FRAMES:
        raise _unusable(path, f"has more than {MAX_CLIP_FRAMES} frames; give its end alone")
    if count < frames:
        raise _unusable(
            path, f"has {count} frames; with this continuity.history_latents a clip must have {frames} or more"
        )
    return np.frombuffer(b"".join(last), np.uint8).reshape(-1, height, width, 3)
