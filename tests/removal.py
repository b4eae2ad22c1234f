"""Removes folders into which a thread that outlives its dead actor may still write for a moment."""

import shutil
import time
from pathlib import Path

PATIENCE_S = 30.0


def remove_folder(folder: Path) -> None:
    """The folder is gone when this returns; one that is not there is none."""
    deadline = time.monotonic() + PATIENCE_S
    while folder.exists():
        assert time.monotonic() < deadline, f"{folder} is still written to"
        shutil.rmtree(folder, ignore_errors=True)
