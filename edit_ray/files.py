"""File access through one replaceable `disk`, and the durable operations on it: write a draft, sync, rename, sync.

Runs and disk tiers write through `disk`. Tests swap it (`swapped`) for one that records every operation or makes one
fail. `append_line`, `write_all` and `remove` do not sync: callers do where it matters. Past `disk` goes what harms no
run if a crash cuts it off: a submission's probe, ffmpeg's drafts, the removal of a run already renamed, some reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xxhash import xxh3_64, xxh3_64_intdigest

DRAFT = ".part"
_CHUNK = 4 << 20
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""A file system has no links, the two places are on different ones, or the file is another user's."""
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL  # and O_EXCL follows no link
"""Flags that open a new file: it must not exist yet, not even as a link."""


class Disk:
    """The calls that reach the file system. All raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor. Only the owner has access to a new file."""
        return os.open(path, flags, 0o600)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def read(self, descriptor: int, parts: Sequence[bytearray | memoryview], offset: int) -> int:
        """The bytes read: fewer than asked for at the end of the file, and possibly before it."""
        return os.preadv(descriptor, parts, offset)

    def write(self, descriptor: int, parts: Sequence[bytes | memoryview], offset: int) -> int:
        """The bytes written, possibly fewer than given. `offset` is ignored on a descriptor opened with O_APPEND."""
        return os.pwritev(descriptor, parts, offset)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def lock(self, descriptor: int) -> None:
        """Raises BlockingIOError where another process holds the lock. The kernel frees that of a dead process."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, which must be free."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path, 0o700)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)


disk = Disk()
"""The disk that all modules use."""


@contextlib.contextmanager
def swapped(other: Disk) -> Iterator[None]:
    """Replace the disk inside it, in all threads of this process."""
    global disk
    before, disk = disk, other
    try:
        yield
    finally:
        disk = before


class Draft:
    """A new file that is renamed when it is whole. Its name is random: no other process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f".{path.name}.{secrets.token_hex(8)}{DRAFT}")
        self.size = 0  # bytes written so far
        self.descriptor = disk.open(self.path, NEW)

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        self.size = write_all(self.descriptor, data, self.size)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Draft]:
    """A draft that replaces `path` durably at the end: a reader sees the old content or the new, never a part.

    After an error, `path` is as it was and the draft is gone.
    """
    draft = Draft(path)
    try:
        try:
            yield draft
            disk.fsync(draft.descriptor)
        finally:
            disk.close(draft.descriptor)
        disk.replace(draft.path, path)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(draft.path)
        raise
    sync(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content durably: a reader sees the old content or the new, never a part."""
    with replacing(path) as draft:
        draft.write(data)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor that is closed at the end."""
    descriptor = disk.open(path, flags)
    try:
        yield descriptor
    finally:
        disk.close(descriptor)


def read_bytes(path: Path) -> bytes:
    """All of a file."""
    with opened(path) as descriptor:
        return read_at(descriptor, 0, os.fstat(descriptor).st_size)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file from `offset` on; fewer where it ends earlier."""
    content, done = bytearray(size), 0
    while done < size and (count := disk.read(descriptor, [memoryview(content)[done:]], offset + done)):
        done += count
    return bytes(memoryview(content)[:done])


def share(source: Path, target: Path) -> None:
    """Have a file that is never changed in a second place as well: by a link, else as a copy that is synced.

    The name is durable once its folder is synced. Raises FileNotFoundError.
    """
    try:
        disk.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with opened(source) as descriptor, replacing(target) as draft:
            while part := read_at(descriptor, draft.size, _CHUNK):
                draft.write(part)


def digest_of(data: bytes) -> int:
    """xxh3_64 of the bytes, with which a later change of a file is detected."""
    return xxh3_64_intdigest(data)


def digest_of_file(path: Path, working: Callable[[], None] = lambda: None) -> int:
    """xxh3_64 of a whole file, read 4 MiB at a time; `working` is called after each read."""
    digest, size = xxh3_64(), _CHUNK
    with opened(path) as descriptor:
        for offset in itertools.count(0, size):
            digest.update(part := read_at(descriptor, offset, size))
            working()
            if len(part) < size:
                return digest.intdigest()
    raise AssertionError("a file has an end")


def append_line(path: Path, line: bytes) -> None:
    """Append a line in one write, unsynced. Create the file if needed, and terminate a torn last line first."""
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as descriptor:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and read_at(descriptor, size - 1, 1) != b"\n"
        write_all(descriptor, b"\n" * torn + line, size)


def write_all(descriptor: int, data: bytes, offset: int) -> int:
    """Write all of `data`, in as many calls as necessary; return the offset of its end."""
    done = 0
    while done < len(data):
        count = disk.write(descriptor, [memoryview(data)[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file system takes no more bytes")
        done += count
    return offset + done


def sync(path: Path) -> None:
    """Make the content of a file durable, or all that was created in, renamed into or removed from a folder."""
    with opened(path) as descriptor:
        disk.fsync(descriptor)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(path)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, durably. Raises FileExistsError where there is a file."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        disk.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync(path.parent)


def remove_drafts(folder: Path, of: str = "") -> None:
    """Remove the drafts in a folder, or those of one file name; ignore what cannot be removed.

    Only for the process that may write there, such as the holder of the manifest's lock. Another writer that is still
    alive cannot publish its draft afterwards.
    """
    with contextlib.suppress(OSError):
        for name in disk.listdir(folder):
            if name.startswith(f".{of}") and name.endswith(DRAFT):
                with contextlib.suppress(OSError):
                    disk.unlink(folder / name)
