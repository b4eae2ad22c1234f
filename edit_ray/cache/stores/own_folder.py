"""A folder for one store at a time: made for its user alone, and locked for as long as the store has it open."""

from __future__ import annotations

import os
from pathlib import Path

from edit_ray import files

LOCK = ".lock"
_OPENING = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


class FolderUnusable(ValueError):
    """A folder that no store can use. `why` is the rest of the sentence after the folder's name."""

    def __init__(self, directory: Path, why: str) -> None:
        self.why = why
        super().__init__(f"directory is {str(directory)!r}, {why}")


class FolderTaken(FolderUnusable):
    """Another store has the folder open."""


def make_own(directory: Path) -> None:
    """Make the folder, and those above it that are missing, with mode 0700. Raises FolderUnusable."""
    try:
        files.make_folder(directory)
    except FileExistsError:
        why = "which is a file; valid is a folder, or a name for one."
        raise FolderUnusable(directory, why) from None
    except OSError as error:
        raise FolderUnusable(directory, f"which cannot be made: {error.strerror}.") from None


def lock(directory: Path) -> int:
    """The descriptor that holds the folder's lock until it is closed, at the latest by the end of the process.

    Raises FolderTaken, or FolderUnusable where the file system has no locks.
    """
    descriptor = None
    try:
        descriptor = files.disk.open(directory / LOCK, _OPENING)
        files.disk.lock(descriptor)
    except OSError as error:
        if descriptor is not None:
            files.disk.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise FolderTaken(directory, "which another store has open; valid is a folder of its own.") from None
        raise FolderUnusable(directory, f"which cannot be locked: {error.strerror}.") from None
    return descriptor
