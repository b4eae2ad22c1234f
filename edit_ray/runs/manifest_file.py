"""`manifest.jsonl`: lines (`manifest_lines`) that are appended and synced, and never changed.

A lock keeps it for one writer. Where the lock is lost, as when a lease of NFS ends, the file itself decides: a line
counts if readers find that it does. So a writer reads what others have added before it writes, and again afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from threading import Lock

from edit_ray import files
from edit_ray.errors import RunFolderGone, RunLocked
from edit_ray.runs.manifest import Line, Manifest
from edit_ray.runs.manifest_lines import Fold, read_back, to_text

_PIECE = 4 << 20
_TRIES = 3  # of writing a line behind torn bytes of others


class ManifestFile:
    """The manifest of a run that this process works on, which no other process can have open for writing."""

    def __init__(self, path: Path, descriptor: int, fold: Fold) -> None:
        self.path = path
        self._descriptor, self._fold = descriptor, fold
        self._incarnation = fold.manifest.incarnation  # its lines count as long as no other one opens the run
        self._size = fold.size  # of the file, which may have torn bytes of others behind the lines

    @classmethod
    def create(cls, path: Path, *lines: Line) -> ManifestFile:
        """A new file with its first lines, synced."""
        with _locked(path, files.NEW | os.O_APPEND) as descriptor:
            text = b"".join(map(to_text, lines))
            _write(descriptor, text, 0)
            fold = Fold(path)
            fold.add(text)
            return cls(path, descriptor, fold)

    @classmethod
    def open(cls, path: Path, reader: ManifestReader | None = None) -> ManifestFile:
        """An existing file; a last line that is not whole is cut off. A `reader` saves reading again what it has read.

        Raises FileNotFoundError, RunLocked where another process works on the run, ManifestUnreadable.
        """
        with _locked(path, os.O_RDWR | os.O_APPEND) as descriptor:
            fold = copy((reader or ManifestReader(path)).folded(descriptor))
            if fold.size < os.fstat(descriptor).st_size:
                files.disk.truncate(descriptor, fold.size)
                fold.add(b"")
            files.disk.fsync(descriptor)
            return cls(path, descriptor, fold)

    @property
    def manifest(self) -> Manifest:
        return self._fold.manifest

    def append(self, line: Line) -> Manifest:
        """Commit one line; return the manifest with it. If it is the last line already it is only synced.

        Raises:
            RunFolderGone: the file was removed or replaced.
            RunLocked: another process has opened the run.
            OSError: it cannot be written, such as on a full disk; it does not count then.
            ValueError: it cannot follow.
        """
        self._check_mine()
        if line.incarnation < self.manifest.incarnation:
            raise RunLocked(f"{self.path} belongs to a later incarnation than {line.incarnation}")
        for _ in range(_TRIES):
            fold = self._fold
            text = to_text(line, fold.lines if fold.torn else None)
            if text == fold.last:  # from an attempt that failed, and could not be undone
                files.disk.fsync(self._descriptor)
                return self.manifest
            followed = self.manifest.after(read_back(text))
            _write(self._descriptor, text, self._size)
            if os.fstat(self._descriptor).st_size == fold.size + len(text):  # no other process has written
                fold.accept(followed, text, fold.size + len(text))
                self._size = fold.size
                counts = True
            else:
                start, counting, content = fold.size, *self._read_on()
                counts = any(start + at.end() in counting for at in re.finditer(re.escape(text), content))
            if counts:
                self._incarnation = max(line.incarnation, self._incarnation)
            self._check_incarnation()
            if counts:
                return self.manifest
        raise RunLocked(f"{self.path} is being written by other processes; this one leaves the run alone")

    def close(self) -> None:
        """Release the lock: another process may work on the run."""
        files.disk.close(self._descriptor)

    def _check_mine(self) -> None:
        """Raise RunFolderGone, RunLocked. Lines that earlier incarnations have written meanwhile are ignored."""
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except OSError:
            there = None
        if there is None or (there.st_ino, there.st_dev) != (mine.st_ino, mine.st_dev):
            raise RunFolderGone(f"the run's folder {self.path.parent} was removed or replaced while the run was active")
        if mine.st_size != self._size:
            self._read_on()
        self._check_incarnation()

    def _read_on(self) -> tuple[set[int], bytes]:
        """Read what was added to the file; return the ends of those lines that count, and the content."""
        start, self._size = self._fold.size, os.fstat(self._descriptor).st_size
        content = files.read_at(self._descriptor, start, self._size - start)
        return self._fold.add(content), content

    def _check_incarnation(self) -> None:
        if self.manifest.incarnation > self._incarnation:
            raise RunLocked(f"{self.path} was written by another process; this one leaves the run alone")


class ManifestReader:
    """Reads a manifest repeatedly, each time only what was added to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._of: tuple[int, int] | None = None  # the file's inode and device
        self._fold = Fold(path)
        self._one_at_a_time = Lock()

    def read(self) -> Manifest:
        """The manifest at this moment. Raises FileNotFoundError, ManifestUnreadable."""
        with files.opened(self._path) as descriptor:
            return self.folded(descriptor).manifest

    def folded(self, descriptor: int) -> Fold:
        """The fold of the open file, which the next call changes. Raises ManifestUnreadable."""
        with self._one_at_a_time:
            there = os.fstat(descriptor)
            if self._of != (there.st_ino, there.st_dev):
                self._of, self._fold = (there.st_ino, there.st_dev), Fold(self._path)
            last = self._fold.last
            if files.read_at(descriptor, self._fold.size - len(last), len(last)) != last:  # a writer has undone a line
                self._fold = Fold(self._path)
            self._read_on(descriptor)
            self._fold.whole()
            return self._fold

    def _read_on(self, descriptor: int) -> None:
        """Read what is new, piece by piece, so that the file is never in memory as a whole."""
        fold, piece, start, collects = self._fold, _PIECE, self._fold.size, gc.isenabled()
        gc.disable()  # a collection would visit all lines so far in vain
        try:
            while True:
                lines, content = fold.lines, files.read_at(descriptor, fold.size, piece)
                fold.add(content)
                if len(content) < piece:
                    break
                if fold.lines == lines:  # a line, or torn bytes, are longer than a piece
                    piece *= 2
        finally:
            if collects:
                gc.enable()
        if fold.size - start > _PIECE:
            gc.freeze()  # these records will stay: collections need not visit them


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """An open manifest with its lock, which an error inside closes. Raises RunLocked."""
    descriptor = files.disk.open(path, flags)
    try:
        try:
            files.disk.lock(descriptor)
        except BlockingIOError:
            raise RunLocked(f"another process is working on the run in {path.parent}") from None
        yield descriptor
    except BaseException:
        files.disk.close(descriptor)
        raise


def _write(descriptor: int, text: bytes, size: int) -> None:
    """Append all of it, durably, to a file of `size` bytes. After a failure it removes its own bytes alone."""
    try:
        if files.disk.write(descriptor, [text], size) != len(text):  # a single write, which no other one interrupts
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.disk.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            written = files.read_at(descriptor, size, len(text) + 1)
            if written and text.startswith(written):
                files.disk.truncate(descriptor, size)
        raise
