"""The page of one run, with its media, for browsers on this machine only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from edit_ray.errors import EditRayError
from edit_ray.page.served import byte_range, open_named

LOOPBACK = "127.0.0.1"
_CHUNK = 1 << 20
_HEADERS = {
    # A run's files change, and the next run that is served here has others under the same names.
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # hls.js plays from blobs that it makes, and works in a worker that is one.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; media-src 'self' blob:; "
        "worker-src 'self' blob:; frame-ancestors 'none'"
    ),
}

Status = Callable[[], Mapping[str, Any]]


class PageServer(ThreadingHTTPServer):
    """Serves the folder of a run on loopback; `status` gives what the page shows of the run, as JSON.

    `port` 0 takes a free one; `url` says which. Raises OSError where the port is taken.
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
        """A viewer that left is nothing to tell; anything else is told here, never to the viewer."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"edit-ray: a request failed: {error!r}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edit-ray", ""
    timeout = 30  # seconds without a byte from a viewer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_address[1]
        # A page from elsewhere whose host name was made to mean this machine still says its own name.
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            return self._refuse(403, "this server answers to its own address only")
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        if name == "status":
            return self._send_status(with_body)
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
            about = {"Content-Type": kind, "Content-Length": str(len(wanted)), "Accept-Ranges": "bytes"}
            if part:
                about["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
            self._head(206 if part else 200, about)
            if with_body:
                self._copy(file, wanted)
        return None

    def _copy(self, file: Any, wanted: range) -> None:
        file.seek(wanted.start)
        left = len(wanted)
        while left:
            data = file.read(min(_CHUNK, left))
            if not data:  # it became shorter; the viewer sees that the connection ends early
                self.close_connection = True
                return
            self.wfile.write(data)
            left -= len(data)

    def _send_status(self, with_body: bool) -> None:
        try:
            body = json.dumps(self.server.status()).encode()
        except (EditRayError, OSError, ValueError):
            return self._refuse(503, "the run cannot be read now")
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if with_body:
            self.wfile.write(body)
        return None

    def _refuse(self, code: int, says: str, about: Mapping[str, str] | None = None) -> None:
        body = f"{says}\n".encode()
        kind = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body))}
        self._head(code, {**kind, **(about or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, code: int, about: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, **about}.items():
            self.send_header(name, value)
        self.end_headers()
