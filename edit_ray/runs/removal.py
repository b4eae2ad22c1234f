"""The end of a run's folder: it loses its name at once, and nobody can be at work on it."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from edit_ray import files
from edit_ray.errors import UnknownRun
from edit_ray.runs.folder import RunFolder

_GONE = ".deleted"


def remove_run(folder: RunFolder) -> None:
    """Removes a run's folder. A crash leaves the run whole, or a hidden folder that the next removal clears away.

    Raises UnknownRun where there is none, RunLocked where a process works on it, ManifestUnreadable, OSError.
    """
    root = folder.path.parent
    if folder.path.is_symlink():
        raise UnknownRun(f"{folder.path} is a link to {os.readlink(folder.path)}; remove it by hand")
    held = folder.open()  # keeps every other process from the run
    try:
        files.disk.replace(folder.path, root / f".{folder.run_id}-{secrets.token_hex(8)}{_GONE}")
        files.sync(root)
    finally:
        held.close()
    for gone in root.glob(f".*{_GONE}"):
        shutil.rmtree(gone, ignore_errors=True)


def size_of(folder: RunFolder) -> int:
    """The bytes that a run's files take on disk."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder.path) for name in names]
    return sum(path.lstat().st_blocks * 512 for path in paths)
