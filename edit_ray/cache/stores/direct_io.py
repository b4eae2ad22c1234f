"""Bytes between memory and whole files, around the page cache wherever the filesystem allows it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore
from typing import TypeVar

import torch

from edit_ray import files
from edit_ray.cache.stores.allocator import ALIGNMENT, rounded

# A link under one of our names is followed by nobody, and a pipe holds nobody up.
READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class DiskFull(OSError):
    """The disk or a quota has no room for a file, of which nothing is left: make room and try again."""


class DirectFiles:
    """Writes and reads whole files with O_DIRECT. Where that is refused, at `open` or later, it does so no more.

    Every part starts at a multiple of `ALIGNMENT` in memory and is a multiple long, whatever the file's true size.
    """

    def __init__(self, num_transfers: int = 1) -> None:
        """At most `num_transfers` files are on their way at once; who comes in another thread then waits."""
        self.direct = bool(_DIRECT)
        self._transfers = BoundedSemaphore(num_transfers)

    def write(self, path: Path, parts: Sequence[memoryview], size: int) -> None:
        """Make a new file of the first `size` bytes of `parts`, not synced. Raises OSError, DiskFull if that is why."""
        try:
            with self._transfers:
                self._direct_if_possible(lambda flag: self._write(path, parts, size, flag))
        except OSError as error:
            raise as_disk_full(error) from None

    def read(self, path: Path, parts: Sequence[memoryview], size: int) -> bool:
        """Fill `parts` with a file of `size` bytes; False, and rubbish in `parts`, for a file of another size."""
        with self._transfers:
            return self._direct_if_possible(lambda flag: self._read(path, parts, size, flag))

    def _direct_if_possible(self, action: Callable[[int], T]) -> T:
        if not self.direct:
            return action(0)
        try:
            return action(_DIRECT)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
        done = action(0)
        self.direct = False  # only now: had this failed as well, it would not have been O_DIRECT
        return done

    def _write(self, path: Path, parts: Sequence[memoryview], size: int, flag: int) -> None:
        length = sum(map(len, parts))
        try:
            with files.opened(path, files.NEW | flag) as descriptor:
                if _move(files.disk.write, descriptor, parts, length) < length:
                    raise OSError(errno.EIO, "The filesystem took no more bytes", str(path))
                if length != size:
                    files.disk.truncate(descriptor, size)
        except BaseException:
            with suppress(OSError):  # also what an open that was refused has made
                files.disk.unlink(path)
            raise

    def _read(self, path: Path, parts: Sequence[memoryview], size: int, flag: int) -> bool:
        with files.opened(path, READING | flag) as descriptor:
            return os.fstat(descriptor).st_size == size and _move(files.disk.read, descriptor, parts, size) == size


def as_disk_full(error: OSError) -> OSError:
    """The error itself, or a DiskFull if it says that there is no room."""
    if error.errno not in _FULL or isinstance(error, DiskFull):
        return error
    return DiskFull(error.errno, error.strerror, error.filename)


def aligned_buffer(size: int) -> torch.Tensor:
    """Fresh memory [rounded(size)] uint8 that starts at a multiple of `ALIGNMENT`."""
    memory = torch.empty(rounded(size) + ALIGNMENT, dtype=torch.uint8)
    return memory.narrow(0, -memory.data_ptr() % ALIGNMENT, rounded(size))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, without a copy."""
    return tensor.numpy().data


def is_tmpfs(directory: Path) -> bool:
    """Whether a folder lies in memory: False where that cannot be told, as without /proc."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    # "36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw": see proc_pid_mountinfo(5).
    found = (line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2] == wanted)
    return next(found, "") in ("tmpfs", "ramfs")


def _move(
    call: Callable[[int, Sequence[memoryview], int], int], descriptor: int, parts: Sequence[memoryview], size: int
) -> int:
    """Repeat a call until it has moved `size` bytes or moves none; the bytes moved."""
    done = 0
    while done < size:
        moved = call(descriptor, _after(parts, done), done)
        if moved == 0:
            break
        done += moved
    return done


def _after(parts: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `parts` behind their first `done` bytes."""
    left = []
    for part in parts:
        if done < len(part):
            left.append(part[done:])
        done = max(0, done - len(part))
    return left
