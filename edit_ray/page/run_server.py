"""An HTTP server for the page and the media of one run, for browsers on this machine only."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edit_ray.errors import EditRayError

_PAGE = "text/html; charset=utf-8"
_MEDIA = (
    (re.compile(r"live(-[0-9]{1,6})?\.m3u8"), "application/vnd.apple.mpegurl"),
    (re.compile(r"(init|stream|final)\.mp4"), "video/mp4"),
    (re.compile(r"segments/[0-9]{5,9}-t[0-9]{1,9}\.m4s"), "video/iso.segment"),
    (re.compile(r"report\.html"), _PAGE),
)
_STATIC = {
    "": ("index.html", _PAGE),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "hls.js": ("hls.js", "text/javascript; charset=utf-8"),
}
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_HERE = Path(__file__).parent
HLS_JS = _HERE / "node_modules" / "hls.js" / "dist" / "hls.light.min.js"
"""hls.js, where `make page` installs it."""


def open_named(run: Path, name: str) -> tuple[int, str] | None:
    """The file that a URL's path (without its first slash) names, as a descriptor, and its type; None if there is none.

    No name leads out of the run's folder: only known names are opened, and no symbolic link below it is followed.
    """
    if name in _STATIC:
        file, kind = _STATIC[name]
        path = HLS_JS if file == "hls.js" else _HERE / "static" / file
        return open_below(path.parent, path.name, kind, links=0)
    kinds = [kind for pattern, kind in _MEDIA if pattern.fullmatch(name)]
    return open_below(run, name, kinds[0]) if kinds else None


def open_below(folder: Path, name: str, kind: str, links: int = os.O_NOFOLLOW) -> tuple[int, str] | None:
    """A regular file below the folder as a descriptor, and its `kind`; None if there is none.

    Opened folder by folder with the flags `links`, so that no link that is created meanwhile can lead elsewhere.
    """
    *folders, file = name.split("/")
    with suppress(OSError), ExitStack() as stack:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, at)
        for inner in folders:
            at = os.open(inner, os.O_RDONLY | os.O_DIRECTORY | links, dir_fd=at)
            stack.callback(os.close, at)
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | links, dir_fd=at)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor, kind
        os.close(descriptor)
    return None


def byte_range(header: str | None, size: int) -> range | None:
    """The bytes of a file of `size` that a Range header asks for; None if the file has none of them.

    All bytes without a header, or with one that is not understood (as RFC 9110 allows).
    """
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


LOOPBACK = "127.0.0.1"
_CHUNK = 1 << 20
HEADERS = {
    # A run's files change, and the next run served on this port has other files under the same names.
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # hls.js plays from blobs that it creates, and runs in a worker loaded from one.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; media-src 'self' blob:; "
        "worker-src 'self' blob:; frame-ancestors 'none'"
    ),
}
"""What every answer to a browser says."""

Status = Callable[[], Mapping[str, Any]]


class PageServer(ThreadingHTTPServer):
    """Serves the folder of a run on loopback; `status` returns the run's status for the page, to be sent as JSON.

    `port` 0 picks a free one, which `url` contains. Raises OSError where the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run: Path, status: Status, port: int = 0) -> None:
        self.run, self.status = run, status
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error here, never to the viewer. A viewer that has disconnected is not an error."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"edit-ray: a request failed: {error!r}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edit-ray", ""
    timeout = 30  # seconds without a byte from a viewer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""

    def do_GET(self) -> None:
        """Answer a request; one of HEAD gets no body."""
        port = self.server.server_address[1]
        # Against DNS rebinding: a foreign page whose host name resolves to this machine still sends its own name.
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            return self._refuse(403, "this server answers to its own address only")
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        if name == "status":
            try:
                status = json.dumps(self.server.status()).encode()
            except (EditRayError, OSError, ValueError):
                return self._refuse(503, "the run cannot be read now")
            return self._send(200, "application/json", status)
        opened = open_named(self.server.run, name)
        if opened is None:
            return self._refuse(404, "there is no such file")
        descriptor, kind = opened
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            wanted = byte_range(self.headers.get("Range"), size)
            if wanted is None:
                return self._refuse(416, "the file has fewer bytes", {"Content-Range": f"bytes */{size}"})
            part = len(wanted) < size
            headers = {"Content-Range": f"bytes {wanted.start}-{wanted.stop - 1}/{size}"} if part else {}
            self._head(206 if part else 200, kind, len(wanted), {"Accept-Ranges": "bytes", **headers})
            file.seek(wanted.start)
            left = len(wanted) if self.command == "GET" else 0
            while left:
                data = file.read(min(_CHUNK, left))
                if not data:  # the file became shorter; the viewer sees the connection end early
                    self.close_connection = True
                    break
                self.wfile.write(data)
                left -= len(data)
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def _refuse(self, code: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(code, "text/plain; charset=utf-8", f"{message}\n".encode(), headers)

    def _send(self, code: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._head(code, kind, len(body), headers or {})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, code: int, kind: str, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        about = {"Content-Type": kind, "Content-Length": str(length)}
        for name, value in {**HEADERS, **about, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
