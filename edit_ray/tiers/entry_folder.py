"""Entries as files of one directory: what is in it, and how each is written, read and found again."""

from __future__ import annotations

import os
import re
import secrets
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch

from edit_ray import files
from edit_ray.tiers.entry_file import (
    READING,
    DirectFiles,
    DiskFull,
    FileEntry,
    aligned_buffer,
    as_disk_full,
    check_dtype,
    checksum_of,
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
"""What went wrong with a file. The first four lose the entry and remove the file; `read` may pass and keeps both."""
UNREADABLE: tuple[Fault, ...] = ("missing", "length", "header", "checksum")


class FolderUnusable(ValueError):
    """A folder that no store can use. `why` is the rest of the sentence after the folder's name."""

    def __init__(self, directory: Path, why: str) -> None:
        self.why = why
        super().__init__(f"directory is {str(directory)!r}, {why}")


class FolderTaken(FolderUnusable):
    """Another store has the folder open."""


class EntryFolder:
    """A directory of entries, locked for one store at a time until `close`; files of others in it stay as they are.

    A file is named after the hash of its key and appears whole, by a rename. Only `sync` makes it durable: what a crash
    tears is found by its length or checksums, here or when it is read. `faults` counts by class. Any thread may call
    anything.
    """

    def __init__(self, directory: str | PathLike[str], *, num_transfers: int = 1, allow_tmpfs: bool = False) -> None:
        """Opens or makes the directory and reads the header of every file of ours. Moves `num_transfers` at once.

        Raises FolderUnusable, a ValueError: `directory` is a file, cannot be made or locked, or lies in memory and
        `allow_tmpfs` is not given; FolderTaken, one of these: another store has it open.
        """
        self.directory = Path(directory)
        _make_own(self.directory)
        if not allow_tmpfs and is_tmpfs(self.directory):
            raise FolderUnusable(
                self.directory,
                "which lies in memory (tmpfs) and not on a disk; valid is a folder on a disk, or allow_tmpfs=True.",
            )
        self._unlock = weakref.finalize(self, os.close, _lock(self.directory))
        self._unlock.atexit = False  # the end of the process unlocks it, and a forked child has not locked it
        self.files = DirectFiles(num_transfers)
        self.faults: dict[Fault, int] = dict.fromkeys(get_args(Fault), 0)
        self.bytes_resident = 0
        self._entries: dict[Key, FileEntry] = {}
        self._writing: dict[Key, int] = {}  # the ticket of the write that may publish a key
        self._tickets = 0
        self._lock = threading.RLock()
        try:
            self._scan()
        except BaseException:
            self._unlock()  # at once: the error holds this object for as long as somebody looks at it
            raise

    def close(self) -> None:
        """Let the next store have the folder. Nobody may use this one any more; entries stay on disk."""
        self._unlock()

    def entries(self) -> dict[Key, FileEntry]:
        """What can be read now, oldest first."""
        with self._lock:
            return dict(self._entries)

    def entry(self, key: Key) -> FileEntry | None:
        """What is known of one entry."""
        return self._entries.get(key)

    def known_keys(self) -> set[Key]:
        """What can be read now or is being written."""
        with self._lock:
            return {*self._entries, *self._writing}

    def begin(self, key: Key) -> tuple[int, Path | None]:
        """Forget what is under a key, as it will be written: the ticket for `write`, and a file for `remove`."""
        check_key(key)
        self._check_open()
        with self._lock:
            aside = self._set_aside(key)
            self._tickets += 1
            self._writing[key] = self._tickets
            return self._tickets, aside

    def write(self, key: Key, ticket: int, memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> bool:
        """Write a tensor from memory that starts at a multiple of 4096 and has `whole_pages` of its bytes.

        False if the key was dropped or written anew since the ticket was given. Raises OSError, DiskFull if there is
        no room, and ValueError; nothing is left then.
        """
        draft = self._draft(key)
        try:
            header, entry = self._described(key, memory, dtype, shape)
            parts = [memory_of(header), memory[: whole_pages(entry.nbytes)]]
            self.files.write(draft, parts, len(parts[0]) + entry.nbytes)
            if self._publish(key, ticket, draft, entry):
                return True
        except BaseException as error:
            self._give_up(key, ticket, draft, error)
            if isinstance(error, OSError):
                raise as_disk_full(error) from None
            raise
        self.remove(draft)
        return False

    def read(self, key: Key, into: memoryview) -> FileEntry | None:
        """Read an entry into memory that starts at a multiple of 4096 and has `whole_pages` of its bytes.

        None, and rubbish in `into`, if there is no such entry, or no longer, or it cannot be read now.
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
        """What of these entries is there survives the loss of power when this returns. Raises OSError."""
        for path in [self._path(key) for key in keys if key in self._entries]:
            with suppress(FileNotFoundError):  # dropped meanwhile
                files.sync(path)
        files.sync(self.directory)

    def drop(self, key: Key) -> Path | None:
        """Forget an entry, and a write of it in flight: what is left to do is to `remove` the file returned."""
        self._check_open()
        with self._lock:
            self._writing.pop(key, None)
            return self._set_aside(key)

    def remove(self, path: Path | None) -> None:
        """Remove a file that `begin` or `drop` has set aside; large ones take milliseconds."""
        if path is not None:
            self._unlink(path)

    def remove_unfinished(self) -> None:
        """Remove what writers left that were stopped, and what was set aside; nobody may be writing."""
        if not self.directory.exists():  # someone has removed it
            return
        for path in self._named(_UNFINISHED):
            self.remove(path)

    def _check_open(self) -> None:
        if not self._unlock.alive:
            raise RuntimeError(f"The store in {self.directory} is closed.")

    def _described(
        self, key: Key, memory: memoryview, dtype: torch.dtype, shape: Sequence[int]
    ) -> tuple[torch.Tensor, FileEntry]:
        check_dtype(dtype)
        sized = FileEntry(dtype, tuple(shape), "")
        if len(memory) < whole_pages(sized.nbytes):
            raise ValueError(f"memory has {len(memory)} bytes; {key} needs {whole_pages(sized.nbytes)}.")
        entry = FileEntry(dtype, sized.shape, checksum_of(memory[: sized.nbytes]))
        text = header_of(key, entry)
        header = aligned_buffer(len(text))
        memory_of(header)[:] = text
        return header, entry

    def _publish(self, key: Key, ticket: int, draft: Path, entry: FileEntry) -> bool:
        with self._lock:
            if self._writing.get(key) != ticket:
                return False
            files.disk.replace(draft, self._path(key))
            del self._writing[key]
            self._add(key, entry)
            return True

    def _give_up(self, key: Key, ticket: int, draft: Path, error: BaseException) -> None:
        self.remove(draft)
        with self._lock:
            if self._writing.get(key) == ticket:
                del self._writing[key]
            if isinstance(error, OSError):
                self.faults["full" if isinstance(as_disk_full(error), DiskFull) else "write"] += 1

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
        return None if checksum_of(into[: entry.nbytes]) == entry.checksum else "checksum"

    def _scan(self) -> None:
        self.remove_unfinished()
        for path in sorted(self._named(_WHOLE), key=lambda path: path.stat().st_mtime_ns):
            try:
                described = self._header_of_file(path)
            except OSError:
                self._count("read")
                continue
            if isinstance(described, str):
                self._count(described)
                self.remove(path)
            else:
                self._add(*described)

    def _header_of_file(self, path: Path) -> tuple[Key, FileEntry] | Fault:
        with files.opened(path, READING) as descriptor:
            header = read_header(descriptor)
            if header is None or path.name != file_name(header[1]):
                return "header"
            size, key, entry = header
            return (key, entry) if os.fstat(descriptor).st_size == size + entry.nbytes else "length"

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
            self._unlink(path)  # by no means may the next one to open the folder find it
            return None
        return aside

    def _unlink(self, path: Path) -> None:
        try:
            files.disk.unlink(path)
        except FileNotFoundError:
            return
        except OSError:
            self._count("remove")

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


def _make_own(directory: Path) -> None:
    """Make the folder, and those above it that are missing, with mode 0700. Raises FolderUnusable."""
    try:
        files.make_folder(directory)
    except FileExistsError:
        why = "which is a file; valid is a folder, or a name for one."
        raise FolderUnusable(directory, why) from None
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
            raise FolderTaken(directory, "which another store has open; valid is a folder of its own.") from None
        raise FolderUnusable(directory, f"which cannot be locked: {error.strerror}.") from None
    return descriptor
