"""The host tier's memory: one piece that its owner makes, and that every process that shares it maps.

The arena is a file in /dev/shm. Where that has too little room, or must not be used, it is a memory file without a
folder (memfd_create(2)), which other processes open as /proc/PID/fd/N. CUDA can register either. The path of a memory
file is followed by its inode, as processes reuse descriptor numbers.
"""

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
from typing import Literal

import torch

from edit_ray.errors import HostMemoryShort, ResourcesUnavailable
from edit_ray.tiers.slots import PAGE, whole_pages

SHARED_MEMORY = "/dev/shm"
_NAMES = "edit_ray-*.arena"
_MOST_VIEWS = 4096  # kept, as making one takes longer than finding it
_MOST_REGISTERED = 512 * 2**30  # bytes; and in one piece, as no copy may cross from one registration into another
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; the module mmap does not name it


class SharedMemoryFull(ResourcesUnavailable):
    """A folder in shared memory has less memory free than an arena needs."""


class Arena:
    """`size_bytes` of memory under a path. The owner makes it with `create` or `create_unnamed`, others `open` it.

    The owner holds a lock on the file until it ends, however it ends. A file that nobody has locked is a dead owner's,
    and the next `create` in that folder removes it. Processes that map it keep their mapping whatever happens to the
    file.
    """

    def __init__(self, path: Path, memory: mmap, descriptor: int | None = None, *, named: bool = False) -> None:
        """Take over a mapping, and the descriptor of an unnamed file; use `create`, `create_unnamed`, `open`."""
        self.path, self.size_bytes = path, len(memory)
        self._memory: mmap | None = memory
        self._descriptor, self._named = descriptor, named
        self._unregister: weakref.finalize[..., Arena] | None = None
        self._views: dict[tuple[int, torch.dtype, tuple[int, ...]], torch.Tensor] = {}

    @classmethod
    def create(cls, size_bytes: int, directory: str | PathLike[str] = SHARED_MEMORY) -> Arena:
        """A new file of `size_bytes`, rounded up to pages, with every page allocated.

        Raises:
            SharedMemoryFull: less is free.
            ValueError: there is no such folder.
        """
        folder = Path(directory)
        if not folder.is_dir():
            raise ValueError(f"directory is {str(directory)!r}, which is no folder; it must be one in shared memory.")
        remove_stale(folder)
        size = whole_pages(size_bytes)
        if size > _free_bytes(folder):
            raise _too_small(folder, size_bytes)
        path, descriptor = _locked_file(folder)
        try:
            memory = _mapped(descriptor, size)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _too_small(folder, size) from None
            raise
        finally:
            os.close(descriptor)  # the mapping has one of its own, so the lock lasts as long as that
        return cls(path, memory, named=True)

    @classmethod
    def create_unnamed(cls, size_bytes: int) -> Arena:
        """A new arena of `size_bytes` in no folder, bounded by the node's memory. Raises HostMemoryShort."""
        size, free = whole_pages(size_bytes), _available_bytes()
        if size > free:
            raise HostMemoryShort(
                f"The host tier needs {size} bytes ({size / 2**20:.0f} MiB) of memory, and this node has {free} "
                f"({free / 2**20:.0f} MiB) available: lower store.host_bytes."
            )
        descriptor = os.memfd_create("edit_ray.arena", os.MFD_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            memory = _mapped(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        inode = os.fstat(descriptor).st_ino
        return cls(Path(f"/proc/{os.getpid()}/fd/{descriptor}:{inode}"), memory, descriptor)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Arena:
        """The arena of another process. Raises FileNotFoundError if it no longer exists."""
        descriptor = _open(path)
        try:
            return cls(Path(path), mmap(descriptor, 0))
        finally:
            os.close(descriptor)

    def register(self) -> bool:
        """Page-lock the memory for this process's CUDA context, so that a GPU copies to and from it by itself.

        Only the process with the GPU does this: a context takes half a gigabyte of it. False where CUDA refuses, as
        beyond a limit on locked memory; copies then go through the driver's own buffers, and the caller waits.
        """
        if self._unregister is None and self._memory is not None and self.size_bytes <= _MOST_REGISTERED:
            address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            if int(torch.cuda.cudart().cudaHostRegister(address, self.size_bytes, 0)) == 0:
                # Memory that CUDA knows is never unmapped: what is mapped there later would not be what it copies to.
                self._unregister = weakref.finalize(self, _unregister, address)
            else:
                with suppress(RuntimeError):  # the error waits in the context, for whatever is called next
                    torch.zeros(1, device="cuda")
        return self._unregister is not None

    def memory(self, offset: int, size: int) -> memoryview:
        """`size` bytes at `offset`, without a copy. Raises ValueError outside the arena, or once it is closed."""
        if self._memory is None:
            raise ValueError(f"The arena {self.path} is closed.")
        if offset < 0 or size < 0 or offset + size > self.size_bytes:
            raise ValueError(f"{size} bytes at {offset} lie outside of the arena, which has {self.size_bytes} bytes.")
        return memoryview(self._memory)[offset : offset + size]

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The memory at `offset` as a contiguous tensor [*shape] on the CPU; every process sees what is written."""
        which = (offset, dtype, tuple(shape))
        if which in self._views:
            return self._views[which]
        memory = self.memory(offset, math.prod(shape) * dtype.itemsize)
        if not memory:
            return torch.empty(tuple(shape), dtype=dtype)
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        # Over the memoryview and not over the mapping itself: so a living tensor keeps the mapping from being closed.
        view = self._views[which] = torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
        return view

    def close(self) -> None:
        """End the arena for this process; the owner also removes the file. Views stay valid, with their memory."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        self._views.clear()
        if self._unregister is not None:
            self._unregister()
        if self._named:
            self.path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
        with suppress(BufferError):  # it is freed with the last view
            memory.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_arena(size_bytes: int, shared_memory: Literal["auto", "require", "never"]) -> Arena:
    """The arena that `store.shared_memory` asks for. Raises HostMemoryShort."""
    if shared_memory == "never":
        return Arena.create_unnamed(size_bytes)
    try:
        return Arena.create(size_bytes)
    except (ResourcesUnavailable, ValueError) as in_folder:  # ValueError: there is no such folder
        if shared_memory == "require":
            raise HostMemoryShort(str(in_folder)) from None
        try:
            return Arena.create_unnamed(size_bytes)
        except HostMemoryShort as anywhere:
            raise HostMemoryShort(f"{in_folder} {anywhere}") from None


def owner_lives(path: str | PathLike[str]) -> bool:
    """Whether an arena's file exists and its owner has it locked."""
    try:
        descriptor = _open(path)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_stale(directory: str | PathLike[str] = SHARED_MEMORY) -> None:
    """Remove the arenas of dead owners; other users' arenas stay."""
    for path in sorted(Path(directory).glob(_NAMES)):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # gone meanwhile, or not ours to open
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            continue  # its owner lives
        finally:
            os.close(descriptor)


def _open(path: str | PathLike[str]) -> int:
    """A descriptor of an arena's file. Raises OSError, FileNotFoundError if another file has its path now."""
    name, _, inode = str(path).partition(":") if str(path).startswith("/proc/") else (str(path), "", "")
    descriptor = os.open(name, os.O_RDWR)
    if inode and os.fstat(descriptor).st_ino != int(inode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return descriptor


def _unregister(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def _locked_file(folder: Path) -> tuple[Path, int]:
    """A new, empty file, locked by this process, and its descriptor."""
    while True:
        path = folder / f"edit_ray-{os.getpid()}-{secrets.token_hex(4)}.arena"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # another process's `remove_stale` found it before it was locked


def _mapped(descriptor: int, size: int) -> mmap:
    """A mapping of which every page is touched: a first touch costs eight times a copy, so no copy should be one."""
    os.posix_fallocate(descriptor, 0, size)  # touching a page of a sparse file would end this process
    memory = mmap(descriptor, size)
    try:
        memory.madvise(_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        torch.frombuffer(memoryview(memory), dtype=torch.uint8)[::PAGE].zero_()
    return memory


def _free_bytes(folder: Path) -> int:
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize if space.f_blocks else sys.maxsize  # a tmpfs without a limit has 0 blocks


def _available_bytes() -> int:
    """See MemAvailable in proc_meminfo(5)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _too_small(folder: Path, needed: int) -> SharedMemoryFull:
    free = _free_bytes(folder)
    return SharedMemoryFull(
        f"The arena needs {needed} bytes ({needed / 2**20:.0f} MiB) of shared memory, and {folder} has {free} "
        f"({free / 2**20:.0f} MiB) free: lower the host tier's budget or enlarge {folder} (docker: --shm-size)."
    )
