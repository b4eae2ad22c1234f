"""The host tier's memory: one file in shared memory, mapped by its owner and by every process that shares it."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import secrets
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from mmap import mmap
from os import PathLike
from pathlib import Path
from types import TracebackType

import torch

from edit_ray.cache.stores.allocator import ALIGNMENT, Extent, rounded
from edit_ray.errors import ResourcesUnavailable

SHARED_MEMORY = "/dev/shm"
_NAMES = "edit_ray-*.arena"
_MOST_VIEWS = 4096  # kept, as making one takes longer than finding it
_MOST_REGISTERED = 512 * 2**30  # bytes; and in one piece, as no copy may cross from one registration into another
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; the module mmap does not name it


class SharedMemoryFull(ResourcesUnavailable):
    """The folder that an arena was asked for has less memory free than it needs."""


class Arena:
    """`size_bytes` of memory in the file `path`. The owner makes it with `create`, other processes map it with `open`.

    It is memory and nothing else: an `ExtentAllocator` says which part is whose. The owner holds a lock on the file
    for as long as it lives, however it ends; an arena that nobody has locked is a dead owner's, and the next `create`
    in that folder removes it. Processes that map it keep their mapping, whatever becomes of the file.
    """

    def __init__(self, path: Path, memory: mmap, owned: bool) -> None:
        """Takes over a mapping; use `create` or `open`."""
        self.path, self.size_bytes, self.owned = path, len(memory), owned
        self._memory: mmap | None = memory
        self._unregister: weakref.finalize[..., Arena] | None = None
        self._views: dict[tuple[Extent, torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    @classmethod
    def create(
        cls, size_bytes: int, directory: str | PathLike[str] = SHARED_MEMORY, minimum_bytes: int | None = None
    ) -> Arena:
        """A new arena of `size_bytes`, rounded up to a page, every page of it there before this returns.

        Where less is free, it raises SharedMemoryFull, which is no ValueError, as the same call may succeed elsewhere;
        or, given `minimum_bytes`, the arena is 7/8 of what is free if that is at least so much. The rest is left to
        others, such as Ray's object store.
        """
        if size_bytes < 1:
            raise ValueError(f"size_bytes is {size_bytes}; valid is 1 or more.")
        folder = Path(directory)
        if not folder.is_dir():
            raise ValueError(f"directory is {str(directory)!r}, which is no folder; valid is one in shared memory.")
        remove_stale(folder)
        size, free = rounded(size_bytes), _free_bytes(folder)
        if size > free and minimum_bytes is not None:
            size = max(rounded(minimum_bytes), (free - free // 8) // ALIGNMENT * ALIGNMENT)
        if size > free:
            raise _too_small(folder, size_bytes if minimum_bytes is None else minimum_bytes, free)
        path, descriptor = _locked_file(folder)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a sparse file would end this process when it is touched
            memory = mmap(descriptor, size)  # duplicates the descriptor, so the lock lasts as long as the mapping
            _populate(memory)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _too_small(folder, size, _free_bytes(folder)) from None
            raise
        finally:
            os.close(descriptor)
        return cls(path, memory, owned=True)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Arena:
        """The arena that another process owns. Raises FileNotFoundError when it is gone."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(Path(path), mmap(descriptor, 0), owned=False)
        finally:
            os.close(descriptor)

    def owner_lives(self) -> bool:
        """Whether the process that made it, and that alone serves it, still holds it."""
        return owner_lives(self.path)

    def register(self) -> bool:
        """Page-lock the memory for this process's CUDA context, so that a GPU copies to and from it by itself.

        Only the process with the GPU does this: a context takes half a gigabyte of it. False where CUDA refuses, as
        beyond a limit on locked memory; copies then go through the driver's own buffers, and whoever asks waits.
        """
        if self._unregister is None and self._memory is not None and self.size_bytes <= _MOST_REGISTERED:
            address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            if int(torch.cuda.cudart().cudaHostRegister(address, self.size_bytes, 0)) == 0:
                # Never is memory given back that CUDA knows: what is mapped there later would not be what it copies to.
                self._unregister = weakref.finalize(self, _unregister, address)
            else:
                with suppress(RuntimeError):  # the error waits in the context, for whatever is called next
                    torch.zeros(1, device="cuda")
        return self._unregister is not None

    def memory(self, extent: Extent) -> memoryview:
        """The bytes of an extent, without a copy."""
        if self._memory is None:
            raise ValueError(f"The arena {self.path} is closed.")
        if extent.offset < 0 or extent.size < 0 or extent.offset + extent.size > self.size_bytes:
            raise ValueError(f"{extent} lies outside of the arena, which has {self.size_bytes} bytes.")
        return memoryview(self._memory)[extent.offset : extent.offset + extent.size]

    def tensor(self, extent: Extent, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A view of an extent as a contiguous tensor on the CPU; what is written to it, every process sees."""
        which = (extent, dtype, tuple(shape))
        if which in self._views:
            return self._views[which]
        size = math.prod(shape) * dtype.itemsize
        if size > extent.size:
            raise ValueError(f"{dtype} {tuple(shape)} has {size} bytes; the extent has {extent.size}.")
        memory = self.memory(extent)
        if size == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        # Over the memoryview and not over the mapping itself: so a living tensor keeps the mapping from being closed.
        view = self._views[which] = torch.frombuffer(memory[:size], dtype=dtype).view(tuple(shape))
        return view

    def close(self) -> None:
        """Ends the arena for this process; the owner removes the file too. Views live on, and the memory with them."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        self._views.clear()
        if self._unregister is not None:
            self._unregister()
        if self.owned:
            self.path.unlink(missing_ok=True)
        try:
            memory.close()
        except BufferError:
            return  # it goes with the last view

    def __enter__(self) -> Arena:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unregister(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def owner_lives(path: str | PathLike[str]) -> bool:
    """Whether the file is there and its owner has it locked."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_stale(directory: str | PathLike[str] = SHARED_MEMORY) -> list[Path]:
    """Remove the arenas of owners that are dead; returns their paths. Other users' arenas are left alone."""
    removed = []
    for path in sorted(Path(directory).glob(_NAMES)):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # gone meanwhile, or not ours to open
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except OSError:
            continue  # its owner lives
        finally:
            os.close(descriptor)
    return removed


def _locked_file(folder: Path) -> tuple[Path, int]:
    """A new, empty file, locked by this process, and its descriptor."""
    while True:
        path = folder / f"edit_ray-{os.getpid()}-{secrets.token_hex(4)}.arena"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # someone else's `remove_stale` found it before it was locked


def _populate(memory: mmap) -> None:
    """Touch every page of new memory: the first touch costs eight times a copy, so no copy should be the first."""
    try:
        memory.madvise(_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        torch.frombuffer(memoryview(memory), dtype=torch.uint8)[::ALIGNMENT].zero_()


def _free_bytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize if space.f_blocks else sys.maxsize  # a tmpfs without a limit has 0 blocks


def _too_small(folder: Path, needed: int, free: int) -> SharedMemoryFull:
    return SharedMemoryFull(
        f"The arena needs {needed} bytes ({needed / 2**20:.0f} MiB) of shared memory, and {folder} has {free} "
        f"({free / 2**20:.0f} MiB) free: lower the host tier's budget or enlarge {folder} (docker: --shm-size)."
    )
