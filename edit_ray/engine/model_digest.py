"""Which weights a model's folder holds: a run goes on with those that it was begun with."""

from __future__ import annotations

import json
import os
from pathlib import Path

from xxhash import xxh3_64

from edit_ray.engine.model_files import INDEX_FILE, local_folder, locate_model
from edit_ray.errors import ModelError
from edit_ray.files import digest_of_file

_known: dict[tuple[str, int, int, int], int] = {}  # digests of files, by path, size, time of the last change and inode


def model_digest(path: str) -> str | None:
    """xxh3_64 of all files that a model is loaded from, as 16 hexadecimal digits; None for a hub id.

    A file is read once in this process, and again when its size, time of change or inode differ. Raises ModelError.
    """
    folder = local_folder(locate_model(path))
    if folder is None:
        return None
    try:
        parts = [folder / name for name in sorted(json.loads((folder / INDEX_FILE).read_bytes()))]
        found = [folder / INDEX_FILE, *(file for part in parts for file in sorted(part.rglob("*")) if file.is_file())]
        digest = xxh3_64()
        for file in found:
            digest.update(f"{file.relative_to(folder)} {_digest(file)}\n".encode())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path!r} ({folder}) cannot be read: {error}") from None
    return digest.hexdigest()


def _digest(file: Path) -> int:
    there = os.stat(file)
    key = str(file), there.st_size, there.st_mtime_ns, there.st_ino
    if key not in _known:
        _known[key] = digest_of_file(file)
    return _known[key]
