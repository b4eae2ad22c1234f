"""The disk tier: entries as files of one folder, and the threads that move them for the owner of an arena."""

from __future__ import annotations

import os
import re
import secrets
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from xxhash import xxh3_64_hexdigest

from edit_ray import files
from edit_ray.tiers.entry_file import (
    READING,
    DirectFiles,
    DiskFull,
    FileEntry,
    aligned_buffer,
    as_disk_full,
    check_dtype,
    file_name,
    header_of,
    is_tmpfs,
    memory_of,
    read_header,
)
from edit_ray.tiers.reuse_plan import Key, check_key
from edit_ray.tiers.slots import whole_pages

LOCK = ".lock"
_OPENING = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_WHOLE = re.compile(r"[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{32}(-[0-9a-f]+)?\.unfinished")

Fault = Literal["missing", "length", "header", "checksum", "read", "write", "full", "remove"]
"""A failure with a file. The first four lose the entry and remove the file; after `read`, which may pass, both stay."""


class FolderUnusable(ValueError):
    """A folder that no store can use. `why` is the rest of the sentence after the folder's name."""

    def __init__(self, directory: Path, why: str) -> None:
        self.why = why
        super().__init__(f"directory is {str(directory)!r}, {why}")


class FolderTaken(FolderUnusable):
    """Another store has the folder open."""


class EntryFolder:
    """A folder of entries, locked for one store at a time until `close`. Other files in it stay as they are.

    A file is named after the hash of its key and appears complete, by a rename. Only `sync` makes it durable: a file
    torn by a crash is recognised by its length or checksums, by the next store or when it is read. `faults` counts by
    kind. Thread-safe.
    """

    def __init__(self, directory: str | PathLike[str], *, num_transfers: int = 1, allow_tmpfs: bool = False) -> None:
        """Open or make the folder and read the header of every entry. Move at most `num_transfers` files at once.

        Raises:
            FolderUnusable: a ValueError. `directory` is a file, cannot be made or locked, or lies in memory and
                `allow_tmpfs` is not given.
            FolderTaken: a FolderUnusable. Another store has it open.
        """
        self.directory = Path(directory)
        _make_own(self.directory)
        if not allow_tmpfs and is_tmpfs(self.directory):
            raise FolderUnusable(
                self.directory,
                "which lies in memory (tmpfs) and not on a disk; it must be a folder on a disk, or allow_tmpfs=True.",
            )
        self._unlock = weakref.finalize(self, os.close, _lock(self.directory))
        self._unlock.atexit = False  # the end of the process unlocks it, and a forked child has not locked it
        self.files = DirectFiles(num_transfers)
        self.faults: dict[Fault, int] = dict.fromkeys(get_args(Fault), 0)
        self.bytes_resident = 0
        self._entries: dict[Key, FileEntry] = {}
        self._writing: dict[Key, object] = {}  # the ticket of the write that may publish a key
        self._lock = threading.RLock()
        try:
            self._scan()
        except BaseException:
            self._unlock()  # at once: the error holds this object for as long as somebody keeps the error
            raise

    def close(self) -> None:
        """Unlock the folder for the next store; entries stay on disk. Every later call raises RuntimeError."""
        self._unlock()

    def entries(self) -> dict[Key, FileEntry]:
        """The readable entries, oldest first."""
        with self._lock:
            return dict(self._entries)

    def entry(self, key: Key) -> FileEntry | None:
        """One readable entry."""
        return self._entries.get(key)

    def begin(self, key: Key) -> tuple[object, Path | None]:
        """Forget the entry of a key that will be written: the ticket for `write`, and a file for `remove`."""
        check_key(key)
        self._check_open()
        with self._lock:
            ticket = self._writing[key] = object()
            return ticket, self._set_aside(key)

    def write(self, key: Key, ticket: object, memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Write a tensor from memory that starts at a multiple of 4096 and has `whole_pages` of its bytes.

        False if the key was dropped or written again since the ticket was given. Raises OSError, DiskFull if there is
        no room, and ValueError; nothing is left then.
        """
        draft = self._draft(key)
        try:
            header, entry = _described(key, memory, dtype, tuple(shape))
            self.files.write(draft, [header, memory[: whole_pages(entry.nbytes)]], len(header) + entry.nbytes)
            with self._lock:
                if published := self._writing.get(key) is ticket:
                    files.disk.replace(draft, self._path(key))
                    del self._writing[key]
                    self._add(key, entry)
        except BaseException as error:
            self.remove(draft)
            with self._lock:
                if self._writing.get(key) is ticket:
                    del self._writing[key]
            if isinstance(error, OSError):
                error = as_disk_full(error)
                self._count("full" if isinstance(error, DiskFull) else "write")
            raise error from None
        if not published:
            self.remove(draft)
        return published

    def read(self, key: Key, into: memoryview) -> FileEntry | None:
        """Read an entry into memory that starts at a multiple of 4096 and has `whole_pages` of its bytes.

        None, with `into` undefined, if there is no such entry, or no longer, or it cannot be read now.
        """
        self._check_open()
        while (entry := self._entries.get(key)) is not None:
            fault = self._load(key, entry, into)
            if fault is None:
                return entry
            with self._lock:
                if self._entries.get(key) is not entry:
                    continue  # dropped or replaced meanwhile: no fault
                self.faults[fault] += 1
                aside = None if fault == "read" else self._set_aside(key)
            self.remove(aside)
            return None
        return None

    def sync(self, keys: Sequence[Key]) -> None:
        """The entries of these keys survive a power loss when this returns. Raises OSError."""
        for path in [self._path(key) for key in keys if key in self._entries]:
            with suppress(FileNotFoundError):  # dropped meanwhile
                files.sync(path)
        files.sync(self.directory)

    def drop(self, key: Key) -> Path | None:
        """Forget an entry, and a write of it in flight; returns the file that is left to `remove`."""
        self._check_open()
        with self._lock:
            self._writing.pop(key, None)
            return self._set_aside(key)

    def remove(self, path: Path | None) -> None:
        """Remove a file that `begin` or `drop` has set aside; large ones take milliseconds."""
        if path is not None:
            try:
                files.disk.unlink(path)
            except FileNotFoundError:
                return
            except OSError:
                self._count("remove")

    def remove_unfinished(self) -> None:
        """Remove drafts of stopped writers, and files that were set aside; nobody may be writing."""
        if self.directory.exists():
            for path in self._named(_UNFINISHED):
                self.remove(path)

    def _check_open(self) -> None:
        if not self._unlock.alive:
            raise RuntimeError(f"The store in {self.directory} is closed.")

    def _load(self, key: Key, entry: FileEntry, into: memoryview) -> Fault | None:
        if len(into) < whole_pages(entry.nbytes):
            raise ValueError(f"into has {len(into)} bytes; {key} needs {whole_pages(entry.nbytes)}.")
        expected = header_of(key, entry)
        header = memory_of(aligned_buffer(len(expected)))
        try:
            parts = [header, into[: whole_pages(entry.nbytes)]]
            whole = self.files.read(self._path(key), parts, len(expected) + entry.nbytes)
        except FileNotFoundError:
            return "missing"
        except OSError:
            return "read"
        if not whole:
            return "length"
        if header != expected:
            return "header"
        return None if xxh3_64_hexdigest(into[: entry.nbytes]) == entry.checksum else "checksum"

    def _scan(self) -> None:
        self.remove_unfinished()
        for path in sorted(self._named(_WHOLE), key=lambda path: path.stat().st_mtime_ns):
            try:
                found = _described_by_file(path)
            except OSError:
                self._count("read")
                continue
            if isinstance(found, str):
                self._count(found)
                self.remove(path)
            else:
                self._add(*found)

    def _set_aside(self, key: Key) -> Path | None:
        """With the lock held: take an entry out, by a rename, which is quick; the file that is left of it."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.bytes_resident -= entry.nbytes
        path, aside = self._path(key), self._draft(key)
        try:
            files.disk.replace(path, aside)
        except FileNotFoundError:
            return None
        except OSError:
            self.remove(path)  # the next store in this folder must not find it
            return None
        return aside

    def _add(self, key: Key, entry: FileEntry) -> None:
        self._entries[key] = entry
        self.bytes_resident += entry.nbytes

    def _count(self, fault: Fault) -> None:
        with self._lock:
            self.faults[fault] += 1

    def _path(self, key: Key) -> Path:
        return self.directory / file_name(key)

    def _draft(self, key: Key) -> Path:
        """A random name, which no other process has."""
        return self._path(key).with_name(f"{self._path(key).stem}-{secrets.token_hex(8)}.unfinished")

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        found = [self.directory / name for name in files.disk.listdir(self.directory) if pattern.fullmatch(name)]
        return [path for path in found if path.is_file() and not path.is_symlink()]


def _described(
    key: Key, memory: memoryview, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[memoryview, FileEntry]:
    """The header of a new file, in aligned memory, and the entry that it describes."""
    check_dtype(dtype)
    size = FileEntry(dtype, shape, "").nbytes
    if len(memory) < whole_pages(size):
        raise ValueError(f"memory has {len(memory)} bytes; {key} needs {whole_pages(size)}.")
    entry = FileEntry(dtype, shape, xxh3_64_hexdigest(memory[:size]))
    text = header_of(key, entry)
    header = memory_of(aligned_buffer(len(text)))
    header[:] = text
    return header, entry


def _described_by_file(path: Path) -> tuple[Key, FileEntry] | Fault:
    with files.opened(path, READING) as descriptor:
        header = read_header(descriptor)
        if header is None or path.name != file_name(header[1]):
            return "header"
        size, key, entry = header
        return (key, entry) if os.fstat(descriptor).st_size == size + entry.nbytes else "length"


def _make_own(directory: Path) -> None:
    """Make the folder, and missing ones above it, with mode 0700. Raises FolderUnusable."""
    try:
        files.make_folder(directory)
    except FileExistsError:
        raise FolderUnusable(directory, "which is a file; it must be a folder, or a name for one.") from None
    except OSError as error:
        raise FolderUnusable(directory, f"which cannot be made: {error.strerror}.") from None


def _lock(directory: Path) -> int:
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
            raise FolderTaken(directory, "which another store has open; it must be a folder of its own.") from None
        raise FolderUnusable(directory, f"which cannot be locked: {error.strerror}.") from None
    return descriptor


class DiskTier:
    """Entries in files, written from and read into memory of the caller, in the order asked for.

    `memory` and `into` start at a multiple of 4096 and hold the tensor's bytes rounded up to one, as a slot does; the
    caller leaves them alone until the future is done. `files` is the index and counts faults. A queued future may be
    cancelled. Of twice `num_threads` threads that many are at the disk; the others compute checksums meanwhile.
    """

    def __init__(self, directory: str | PathLike[str], *, num_threads: int = 2, allow_tmpfs: bool = False) -> None:
        """Open or make `directory` and find the entries in it. Raises ValueError as `EntryFolder` does."""
        self.files = EntryFolder(directory, num_transfers=num_threads, allow_tmpfs=allow_tmpfs)
        self._threads = ThreadPoolExecutor(2 * num_threads, thread_name_prefix="disk")
        self._closed = False

    def write(self, key: Key, memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Future[bool]:
        """Replace an entry. The earlier one is gone at once, the new one is readable when the future is done.

        False if it was dropped or written again before that. Its error is DiskFull where room must be made, else an
        OSError; the key has no entry then.
        """
        ticket, aside = self.files.begin(key)
        future = self._threads.submit(self.files.write, key, ticket, memory, dtype, shape)
        self._remove(aside)
        return future

    def read(self, key: Key, into: memoryview) -> Future[FileEntry | None]:
        """Read an entry; None, with `into` undefined, if there is none or it cannot be read."""
        return self._threads.submit(self.files.read, key, into)

    def drop(self, key: Key) -> None:
        """Forget an entry at once, also one that is being written; a thread removes its file."""
        self._remove(self.files.drop(key))

    def close(self) -> None:
        """Cancel queued work, wait for transfers, end the threads, unlock the folder. Entries stay on disk.

        Every later call raises RuntimeError.
        """
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        with suppress(OSError):  # the next store in this folder does it as well
            self.files.remove_unfinished()
        self.files.close()

    def _remove(self, aside: Path | None) -> None:
        if aside is not None:
            self._threads.submit(self.files.remove, aside)
