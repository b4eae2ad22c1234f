"""What the door counts of its requests: the route, by its template, and what came of it, by a word of a closed list."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.routing import Match

from edit_ray.server.gate import REFUSED, Receive, Scope, Send
from edit_ray.server.refusals import CODES

LABELS = ("method", "route", "outcome")
METHODS = ("GET", "HEAD", "POST", "PATCH", "DELETE")
ANSWERED, LEFT, OTHER = "answered", "left", "other"
OUTCOMES = (ANSWERED, *CODES, LEFT)
"""`answered`, the `error.code` of a refusal, or `left`: the client has, before it was answered."""

Count = Callable[[dict[str, str]], None]
"""Counts one request under these labels."""


class Counted:
    """An ASGI application around the door's: counts each request once, when its answer begins."""

    def __init__(self, app: Any, count: Count) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outcome: str | None = None

        def came_of_it(found: str) -> None:
            nonlocal outcome
            if outcome is None:
                outcome = found
                self._count(labels_of(scope, found))

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                came_of_it(ANSWERED if message["status"] < 400 else scope.get(REFUSED, OTHER))
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:  # so Ray Serve tells that the client has left
            came_of_it(LEFT)
            raise
        except Exception:  # which is answered further out
            came_of_it("internal_error")
            raise
        came_of_it(LEFT)


def labels_of(scope: Scope, outcome: str) -> dict[str, str]:
    """The labels of a request. What a client may choose freely is `other`: there are no more labels than routes."""
    method = scope["method"] if scope["method"] in METHODS else OTHER
    return {"method": method, "route": _route_of(scope), "outcome": outcome if outcome in OUTCOMES else OTHER}


def _route_of(scope: Scope) -> str:
    """The template of the request's path, also of one that was refused before it came to its route."""
    route = scope.get("route")
    if route is None:
        matching = (route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE)
        route = next(matching, None)
    return OTHER if route is None else str(route.path)
