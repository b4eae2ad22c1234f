"""Which files of a run's folder may be fetched, and which bytes of them: decided here, without a socket."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

PAGE = "text/html; charset=utf-8"
PLAYLIST = "application/vnd.apple.mpegurl"

_MEDIA = (
    (re.compile(r"live(-[0-9]{1,6})?\.m3u8"), PLAYLIST),
    (re.compile(r"(init|stream|final)\.mp4"), "video/mp4"),
    (re.compile(r"segments/[0-9]{5,9}-t[0-9]{1,9}\.m4s"), "video/iso.segment"),
    (re.compile(r"report\.html"), PAGE),
)
_STATIC = {
    "": ("index.html", PAGE),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "hls.js": ("hls.js", "text/javascript; charset=utf-8"),
}
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_HERE = Path(__file__).parent
HLS_JS = _HERE / "node_modules" / "hls.js" / "dist" / "hls.light.min.js"
"""Where `make page` installs it."""


def open_named(run: Path, name: str) -> tuple[int, str] | None:
    """A descriptor of the file that a URL's path (without its first slash) names, and its type; None if it names none.

    No name leads out of the run's folder: only known ones are looked up, and no symbolic link below it is followed.
    """
    if name in _STATIC:
        file, kind = _STATIC[name]
        return _opened(HLS_JS if file == "hls.js" else _HERE / "static" / file, kind)
    for pattern, kind in _MEDIA:
        if pattern.fullmatch(name):
            return _opened_within(run, name, kind)
    return None


def byte_range(header: str | None, size: int) -> range | None:
    """The bytes of a file of `size` that a Range header asks for: all of them without one, or with one that is not
    understood (RFC 9110 lets us), None if it asks only for bytes that are not there."""
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or match.group() == "bytes=-":
        return range(size)
    first, last = match.groups()
    if not first:
        count = min(int(last), size)
        return range(size - count, size) if count else None
    if last and int(last) < int(first):
        return range(size)
    start, end = int(first), min(int(last) + 1 if last else size, size)
    return range(start, end) if start < size else None


def _opened(path: Path, kind: str) -> tuple[int, str] | None:
    try:
        return _regular(os.open(path, os.O_RDONLY), kind)
    except OSError:
        return None


def _regular(descriptor: int, kind: str) -> tuple[int, str] | None:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor, kind
    os.close(descriptor)
    return None


def _opened_within(run: Path, name: str, kind: str) -> tuple[int, str] | None:
    """Opens step by step, so that nothing that is put in the way meanwhile can lead elsewhere."""
    *folders, file = name.split("/")
    try:
        at = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = inner
        return _regular(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at), kind)
    except OSError:
        return None
    finally:
        os.close(at)
