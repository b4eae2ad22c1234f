"""The user's pictures and clips as frames."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from edit_ray.engine.model_files import known_digest, roots_in
from edit_ray.engine.options import is_clip
from edit_ray.errors import ConfigError
from edit_ray.files import digest_of
from edit_ray.runs.run_plan import Pictures
from edit_ray.video.encode import EncodeError, Patience, watched

ROOTS_VARIABLE = "EDIT_RAY_PICTURE_ROOTS"
"""Folders as in PATH. If a cluster's operator sets it, pictures and clips are read only from there."""
MAX_PIXELS = 2**26  # of a picture, or of a frame of a clip
MAX_CLIP_FRAMES = 100_000
_PATIENCE = Patience()
_INIT, _PICTURE = "continuity.init", "a picture of the run"

Frames = npt.NDArray[np.uint8]

# The formats of `is_clip`'s names; others, such as playlists, could make ffmpeg open other files.
_FORMATS = "mov,matroska,avi,gif"


def read_init(path: str, *, frames: int, height: int, width: int) -> Frames:
    """The picture, or the last `frames` frames of the clip, as uint8 [F, H, W, 3].

    Scaled in proportion until they cover `height` and `width`, and cut around the middle. A picture's transparent parts
    are black. Raises `ConfigError`, which says what is wrong with the file.
    """
    if not is_clip(path):
        return read_picture(path, height=height, width=width)
    _check_file(_INIT, path)
    return _read_clip(path, frames, height, width)


def read_picture(path: str, *, height: int, width: int, key: str = _INIT) -> Frames:
    """The picture as uint8 [1, H, W, 3]: turned as its camera says, 16 bits and CMYK as 8 bits of RGB.

    Scaled, cut and laid on black as by `read_init`. Raises `ConfigError`, which names the `key` that has the path.
    """
    _check_file(key, path)
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
            size, count = picture.size, getattr(picture, "n_frames", 1)
            if size[0] * size[1] <= MAX_PIXELS and count == 1:
                upright = _of_8_bits(ImageOps.exif_transpose(picture)).convert("RGBA")
                opaque = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright).convert("RGB")
                return np.asarray(ImageOps.fit(opaque, (width, height), Image.Resampling.LANCZOS))[None]
    except Exception as error:  # a broken file makes Pillow's readers raise anything
        said = str(error).replace(repr(path), "the file")
        raise _unusable(key, path, f"cannot be read as a picture ({said})") from None
    if count > 1:
        raise _unusable(key, path, f"has {count} frames; a picture must have one")
    raise _unusable(key, path, f"has {size[0]}x{size[1]} pixels; a picture must have at most {MAX_PIXELS}")


def picture_arguments(pictures: Pictures, *, height: int, width: int) -> dict[str, Any]:
    """The pictures as the pipeline's arguments, those that there are. Raises `ConfigError`."""

    def read(path: str) -> Image.Image:
        return Image.fromarray(read_picture(path, height=height, width=width, key=_PICTURE)[0])

    files = {"image": pictures.image, "last_image": pictures.last_image}
    given: dict[str, Any] = {name: read(path) for name, path in files.items() if path is not None}
    references = [read(path) for path in pictures.reference_images]
    return given | ({"reference_images": references} if references else {})


def pictures_digest(paths: Sequence[str]) -> str:
    """xxh3_64 of all these files, as 16 hexadecimal digits. Raises `ConfigError` for one that cannot be read."""
    digests = []
    for path in paths:
        _check_allowed(_PICTURE, path)
        try:
            digests.append(f"{known_digest(Path(path)):016x}")
        except OSError as error:
            raise _unusable(_PICTURE, path, f"cannot be read ({error.strerror})") from None
    return f"{digest_of(' '.join(digests).encode()):016x}"


def _check_file(key: str, path: str) -> None:
    """Raises `ConfigError`: there is none, or it is outside `$EDIT_RAY_PICTURE_ROOTS`."""
    if not os.path.isfile(path):
        raise _unusable(key, path, "is not a file here")
    _check_allowed(key, path)


def _check_allowed(key: str, path: str) -> None:
    roots, file = roots_in(ROOTS_VARIABLE), Path(path).resolve()
    if roots and not any(file.is_relative_to(root.resolve()) for root in roots):
        said = os.pathsep.join(map(str, roots))
        raise _unusable(key, path, f"is not allowed here; pictures and clips are files in {said}")


def _unusable(key: str, path: str, why: str) -> ConfigError:
    return ConfigError([f"{key} is {path!r}, which {why}."])


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8 bits, which Pillow's own conversion clips; others unchanged."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    return picture


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
            raise _unusable(_INIT, path, f"cannot be read as a clip ({hung})") from None
        said.seek(0)
        words = said.read(10_000).decode(errors="replace").strip().splitlines()
    if process.returncode or not count:
        raise _unusable(_INIT, path, f"cannot be read as a clip ({words[-1] if words else 'it has no frames'})")
    if count > MAX_CLIP_FRAMES:
        raise _unusable(_INIT, path, f"has more than {MAX_CLIP_FRAMES} frames; give its end alone")
    if count < frames:
        raise _unusable(
            _INIT, path, f"has {count} frames; with this continuity.history_latents a clip must have {frames} or more"
        )
    return np.frombuffer(b"".join(last), np.uint8).reshape(-1, height, width, 3)
