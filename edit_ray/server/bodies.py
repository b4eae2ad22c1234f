"""Requests' bodies and queries as mappings, and files as answers: between starlette and `VideoService`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from edit_ray.config.mistakes import show
from edit_ray.page.run_server import byte_range
from edit_ray.server.form_fields import from_json, nested
from edit_ray.server.refusals import Problem, Refusal, refuse
from edit_ray.server.video_service import Opened

MOST_FIELDS, MOST_FILES, FIELD_BYTES = 500, 1, 4 << 20
_CHUNK = 1 << 18
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


async def body_of(request: Request) -> Mapping[str, Any]:
    """The fields of a request's body, JSON or a form; files as bytes. Raises Refusal."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            given = from_json(await request.body())
        except ValueError as error:
            raise refuse("invalid_request", f"The body {error}") from None
        if not isinstance(given, Mapping):
            raise refuse("invalid_request", f"The body is {show(given)}; it must be a JSON object.")
        return given
    if kind not in _FORMS:
        async for _ in request.stream():  # a client that is still sending would see its connection break
            pass
        said = f"it must be application/json or {_FORMS[0]}."
        raise refuse("wrong_media_type", f"The Content-Type is {show(kind)}; {said}")
    form = request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=FIELD_BYTES)
    async with form as fields:
        read = [(name, await _read(value)) for name, value in fields.multi_items()]
    found, problems = nested(read)
    problems += [
        Problem(f"{show(name)[:100]} is a file; it must be text.", name[:64])
        for name, value in found.items()
        if isinstance(value, bytes) and name != "input_reference"
    ]
    if problems:
        raise Refusal(*problems)
    return found


async def _read(value: UploadFile | str) -> bytes | str:
    return await value.read() if isinstance(value, UploadFile) else value


def query_of(request: Request, *known: str) -> dict[str, str]:
    """The parameters of the URL's query. Raises Refusal for one that is unknown, or there twice."""
    found: dict[str, str] = {}
    problems = []
    for name, value in request.query_params.multi_items():
        if name not in known:
            valid = f"known here: {', '.join(known)}" if known else "none is known here"
            problems.append(
                Problem(f"{show(name)[1:-1]} is an unknown parameter ({valid}).", name[:64], "unknown_field")
            )
        elif name in found:
            problems.append(Problem(f"{name} is given twice; it must be given once.", name))
        else:
            found[name] = value
    if problems:
        raise Refusal(*problems)
    return found


def file_answer(request: Request, opened: Opened, headers: Mapping[str, str] | None = None) -> Response:
    """The file, or the bytes of it that the request's Range asks for. Raises Refusal if it has none of them."""
    descriptor, kind = opened
    size = os.fstat(descriptor).st_size
    wanted = byte_range(request.headers.get("range"), size)
    if wanted is None:
        os.close(descriptor)
        said = f"The file has {size} bytes, and none of the range."
        raise Refusal(Problem(said, "Range", "wrong_range"), headers={"Content-Range": f"bytes */{size}"})
    about = {"Accept-Ranges": "bytes", "Content-Length": str(len(wanted)), **(headers or {})}
    if len(wanted) < size:
        about["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size}"
    status = 206 if len(wanted) < size else 200
    if request.method == "HEAD":
        os.close(descriptor)
        return Response(None, status, about, kind)
    return _FileAnswer(os.fdopen(descriptor, "rb"), wanted, status, about, kind)


class _FileAnswer(StreamingResponse):
    """Bytes of a file, which is closed even if the client has left before the first of them."""

    def __init__(self, file: BinaryIO, wanted: range, status: int, about: Mapping[str, str], kind: str) -> None:
        self._file = file
        super().__init__(_pieces(file, wanted), status, about, kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


def _pieces(file: BinaryIO, wanted: range) -> Iterator[bytes]:
    """The bytes, as long as the file has them: if it became shorter, the connection ends early."""
    file.seek(wanted.start)
    left = len(wanted)
    while left and (data := file.read(min(_CHUNK, left))):
        yield data
        left -= len(data)
