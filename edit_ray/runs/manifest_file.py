"""`manifest.jsonl`: one JSON object a line, appended and synced, never written again.

Each line begins with a checksum of the rest of it. A last line that is not whole was never committed: readers pass over
it, and whoever goes on with the run cuts it off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edit_ray import files
from edit_ray.errors import ManifestUnreadable, RunFolderGone, RunLocked
from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.manifest import (
    SCHEMA,
    Begun,
    Committed,
    Dropped,
    Ended,
    Extended,
    Line,
    Manifest,
    Moved,
    Opened,
    Rerolled,
    SegmentRecord,
    Tiled,
)
from edit_ray.runs.plan import Take

_KINDS: dict[str, type[Line]] = {
    "begun": Begun,
    "opened": Opened,
    "extended": Extended,
    "rerolled": Rerolled,
    "committed": Committed,
    "tiled": Tiled,
    "moved": Moved,
    "dropped": Dropped,
    "ended": Ended,
}
_KIND_OF = {line: name for name, line in _KINDS.items()}
_INSIDE: dict[str, tuple[str, type]] = {
    "begun": ("layout", FrameLayout),
    "committed": ("segment", SegmentRecord),
    "rerolled": ("take", Take),
}
_HEAD = len('{"crc": "00000000", ')
_BEGIN = b'{"crc": "'  # inside a line: the end of a committed one is damaged, as quotes in texts are escaped


class ManifestFile:
    """The manifest of a run that this process works on: no other process can have it open for writing meanwhile."""

    def __init__(self, path: Path, descriptor: int, manifest: Manifest, size: int) -> None:
        self.path, self.manifest = path, manifest
        self._descriptor, self._size = descriptor, size

    @classmethod
    def create(cls, path: Path, begun: Begun) -> ManifestFile:
        """A new file with its first line, synced."""
        descriptor = files.disk.open(path, files.NEW)
        with _closed_on_error(descriptor):
            _lock(descriptor, path)
            text = to_text(begun)
            _write(descriptor, text, 0)
            return cls(path, descriptor, Manifest.start(begun), len(text))

    @classmethod
    def open(cls, path: Path) -> ManifestFile:
        """An existing file; a last line that is not whole is cut off.

        Raises FileNotFoundError, RunLocked where another process works on the run, ManifestUnreadable.
        """
        descriptor = files.disk.open(path, os.O_RDWR)
        with _closed_on_error(descriptor):
            _lock(descriptor, path)
            manifest, size = from_bytes(files.read_all(descriptor), path)
            files.disk.truncate(descriptor, size)
            files.disk.fsync(descriptor)
            return cls(path, descriptor, manifest, size)

    def append(self, line: Line) -> Manifest:
        """Commits one line; returns the manifest with it.

        Raises:
            RunFolderGone: the file was removed or replaced.
            RunLocked: somebody else has written to it.
            OSError: it cannot be written, such as on a full disk; then it is as it was.
        """
        manifest = self.manifest.after(line)
        self._check_mine()
        text = to_text(line)
        _write(self._descriptor, text, self._size)
        self.manifest, self._size = manifest, self._size + len(text)
        return manifest

    def close(self) -> None:
        """Another process may have the run."""
        files.disk.close(self._descriptor)

    def _check_mine(self) -> None:
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except OSError:
            there = None
        if there is None or (there.st_ino, there.st_dev) != (mine.st_ino, mine.st_dev):
            raise RunFolderGone(
                f"the run's folder {self.path.parent} was removed or replaced while the run was at work"
            )
        if mine.st_size != self._size:
            raise RunLocked(f"{self.path} was written by another process; this one leaves the run alone")


def read_manifest(path: Path) -> Manifest:
    """What is committed at this moment. Raises FileNotFoundError, ManifestUnreadable."""
    return from_bytes(files.read_bytes(path), path)[0]


def to_text(line: Line) -> bytes:
    """A line as it is written, with its end."""
    body = json.dumps({"kind": _KIND_OF[type(line)], **asdict(line)}, ensure_ascii=False)[1:].encode()
    return b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body)


def from_bytes(content: bytes, path: Path) -> tuple[Manifest, int]:
    """The manifest, and how many bytes of the content are whole lines. Raises ManifestUnreadable."""
    lines = content.split(b"\n")[:-1]
    manifest: Manifest | None = None
    size = 0
    for number, text in enumerate(lines, 1):
        try:
            values = _checked(text)
            manifest = Manifest.start(_first(values)) if manifest is None else manifest.after(_line(values))
        except (ValueError, TypeError, KeyError, RecursionError) as damage:
            if number == len(lines) > 1 and isinstance(damage, _Torn) and _BEGIN not in text[1:]:
                break
            raise ManifestUnreadable(f"{path}, line {number}: {damage}; the run cannot be read from here on") from None
        size += len(text) + 1
    if manifest is None:
        raise ManifestUnreadable(f"{path} has no whole line: it is empty, or was cut off; this is no run")
    return manifest, size


class _Torn(ValueError):
    """A line that is not as it was written."""


def _checked(text: bytes) -> dict[str, Any]:
    body = text[_HEAD:]
    if text[:_HEAD] != b'{"crc": "%08x", ' % zlib.crc32(body):
        raise _Torn("the line is damaged (its checksum does not fit), or this is no manifest")
    values: dict[str, Any] = json.loads(b"{" + body)
    return values


def _first(values: dict[str, Any]) -> Begun:
    if values.get("kind") != "begun":
        raise ValueError("the first line of a manifest is missing")
    if values.get("schema") != SCHEMA:
        newer = "a newer" if isinstance(values.get("schema"), int) and values["schema"] > SCHEMA else "another"
        raise ValueError(f"this is {newer} version's manifest (schema {values.get('schema')!r}; known here: {SCHEMA})")
    line = _line(values)
    assert isinstance(line, Begun)
    return line


def _line(values: dict[str, Any]) -> Line:
    kind = values.pop("kind")
    if kind not in _KINDS:
        raise ValueError(f"a line of the kind {kind!r} is not known here")
    if kind in _INSIDE:
        name, inside = _INSIDE[kind]
        values[name] = _made(inside, values[name])
    line: Line = _made(_KINDS[kind], values)
    return line


def _made(cls: Any, values: Mapping[str, Any]) -> Any:
    """An object of the class, its values of the types that it declares. Raises ValueError, TypeError."""
    for name, hint in _hints(cls).items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(f"{name} is {repr(values[name])[:60]}, which it cannot be")
    return cls(**values)


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether JSON data is of a type; all whole numbers of a manifest count something."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is not None:
        return isinstance(value, origin) and all(_fits(part, inner[1]) for part in value.values())
    if hint is int:
        return type(value) is int and value >= 0
    return isinstance(value, (int, float) if hint is float else hint)


def _lock(descriptor: int, path: Path) -> None:
    try:
        files.disk.lock(descriptor)
    except BlockingIOError:
        raise RunLocked(f"another process is at work on the run in {path.parent}") from None


def _write(descriptor: int, text: bytes, at: int) -> None:
    """All of it, durable; or nothing of it."""
    try:
        if files.disk.write(descriptor, [text], at) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.disk.fsync(descriptor)
    except BaseException:
        files.disk.truncate(descriptor, at)
        raise


@contextlib.contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        files.disk.close(descriptor)
        raise
