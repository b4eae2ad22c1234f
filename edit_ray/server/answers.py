"""Answers of the door's routes, and what becomes of errors: always JSON in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from edit_ray.errors import EditRayError
from edit_ray.server.gate import REFUSED
from edit_ray.server.refusals import Refusal, refusal_of, refuse
from edit_ray.server.request_counts import LEFT
from edit_ray.server.video_object import as_json
from edit_ray.server.video_service import whole_number

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Awaitable[Response]])
_T = TypeVar("_T")

# Not Starlette's threads: on an event loop that anyio has not started, a call of theirs visits every task there is.
_reading, _changing = ThreadPoolExecutor(32, "read"), ThreadPoolExecutor(16, "change")


def add_handlers(app: FastAPI) -> None:
    """Make an answer of every error that a route raises."""
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(EditRayError, _failed)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(OSError, _unreadable)
    app.add_exception_handler(ClientDisconnect, _nobody_waits)
    app.add_exception_handler(Exception, _broken)


def readable(app: FastAPI, path: str, **about: Any) -> Callable[[_Endpoint], _Endpoint]:
    """A route of GET, and of HEAD, which the schema does not say."""

    def add(endpoint: _Endpoint) -> _Endpoint:
        app.head(path, include_in_schema=False)(endpoint)
        return app.get(path, **about)(endpoint)

    return add


async def read(ask: Callable[..., _T], *arguments: Any) -> _T:
    """What a call returns that reads, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(_reading, partial(ask, *arguments))


async def answered(ask: Callable[..., BaseModel], *arguments: Any) -> Response:
    """As `read`, as JSON."""
    return JSONResponse(as_json(await read(ask, *arguments)))


async def changed(ask: Callable[..., BaseModel], *arguments: Any) -> Response:
    """As `answered`, for what may take long: it takes no thread from those who read."""
    loop = asyncio.get_running_loop()
    return JSONResponse(as_json(await loop.run_in_executor(_changing, partial(ask, *arguments))))


def segment_index(segment: str) -> int:
    """The number of a segment in a URL. Raises Refusal."""
    return whole_number(segment, "segment", 0, 10**9)


def _refusal_answer(request: Request, refusal: Refusal) -> Response:
    request.scope[REFUSED] = refusal.code
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return _refusal_answer(request, refusal)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, EditRayError)
    return _refusal_answer(request, refusal_of(error))


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        said = f"{request.method} is not possible here; see /openapi.json."
        return _refusal_answer(request, refuse("method_not_allowed", said))
    if error.status_code == 404:
        return _refusal_answer(request, refuse("not_found", "There is no such path; /openapi.json has all of them."))
    return _refusal_answer(request, refuse("invalid_request", f"The body cannot be read: {error.detail}"))


async def _unreadable(request: Request, error: Exception) -> Response:
    said = getattr(error, "strerror", None) or type(error).__name__
    refusal = refuse("unavailable", f"The folder of runs does not answer ({said}); ask again later.")
    return _refusal_answer(request, refusal)


async def _broken(request: Request, error: Exception) -> Response:
    refusal = refuse("internal_error", "The server has failed at this request; its log says more.")
    return _refusal_answer(request, refusal)


async def _nobody_waits(request: Request, error: Exception) -> Response:
    """The client has left before its body was whole, which is no failure of this server."""
    request.scope[REFUSED] = LEFT
    return Response(status_code=400)
