"""Pictures and clips that requests bring: what they are, and where they lie while a run needs them.

A file is stored beside the runs, in `.uploads`, under the id of the run that it begins. A branch of that run names it
too, so it is removed with the last run whose run.yaml names it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import time
from pathlib import Path

from edit_ray import files
from edit_ray.runs.folder import folders_in

FOLDER = ".uploads"
MAX_BYTES = 64 << 20
LITTER_S = 3600.0  # the age at which a file that no run names is removed

_DATA_URL = re.compile(r"data:[a-z]{1,20}/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
_NAMED = re.compile(rf"/{re.escape(FOLDER)}/([a-z0-9_-]{{1,64}}\.[a-z0-9]{{3,4}})\b")
_KINDS = "a picture (PNG, JPEG, WebP, BMP) or a clip (MP4, MOV, Matroska, WebM, AVI, GIF)"


def kind_of(data: bytes) -> str | None:
    """The ending of the name of such a file, by its first bytes; None if it is none that a run can begin with."""
    starts = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg", b"BM": ".bmp", b"GIF8": ".gif"}
    for start, kind in starts.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF":
        return {b"WEBP": ".webp", b"AVI ": ".avi"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        return ".mov" if data[8:12] == b"qt  " else ".mp4"
    return ".mkv" if data[:4] == b"\x1aE\xdf\xa3" else None  # WebM is Matroska


def checked_kind(data: bytes) -> str:
    """As `kind_of`. Raises ValueError with a predicate if it is none, empty or too large."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"has {len(data)} bytes; it must have at most {MAX_BYTES}.")
    if (kind := kind_of(data)) is None:
        raise ValueError(f"is {'empty' if not data else 'another kind of file'}; it must be {_KINDS}.")
    return kind


def from_data_url(url: str) -> bytes:
    """The bytes of a data URL in base64. Raises ValueError with a predicate for every other URL: none is fetched."""
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError("is no data URL in base64; it must be one, as the server fetches nothing, or a file.")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("has characters that are not base64; it must be a data URL in base64.") from None


def store(root: Path, run_id: str, data: bytes, kind: str) -> Path | None:
    """Store the file that a run begins with; None if the run has another one already. Litter is removed before."""
    folder = root / FOLDER
    files.make_folder(folder)
    _sweep(root)
    path = folder / f"{run_id}{kind}"
    known = [other for other in folder.glob(f"{run_id}.*") if other.stem == run_id]
    if known:
        return path if known == [path] and files.read_bytes(path) == data else None
    files.write_atomic(path, data)
    return path


def named_in(run_yaml: str) -> set[str]:
    """The uploads that a run's configuration names."""
    return set(_NAMED.findall(run_yaml))


def forget(root: Path, names: set[str]) -> None:
    """Remove the files of a run that was deleted, unless others name them."""
    for name in names - _used(root) if names else ():
        with contextlib.suppress(OSError):
            files.remove(root / FOLDER / name)


def _sweep(root: Path) -> None:
    """Remove what requests have left that made no run."""
    before = time.time() - LITTER_S
    old = {entry.name for entry in os.scandir(root / FOLDER) if entry.stat(follow_symlinks=False).st_mtime < before}
    if old:
        forget(root, old)


def _used(root: Path) -> set[str]:
    used = set[str]()
    for folder in folders_in(root):
        with contextlib.suppress(OSError, ValueError):
            used |= named_in(folder.run_yaml.read_text())
    return used
