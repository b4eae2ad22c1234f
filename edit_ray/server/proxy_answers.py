"""What Serve's proxy says where no replica has answered, in the door's words: a client may ask again.

Of itself the proxy says 500 where a replica has died under a request, 404 before it knows the route, and 503 without
`Retry-After` where no replica is left. Clients take the first two for an answer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.middleware import Middleware

from edit_ray.server.gate import Receive, Scope, Send, answer
from edit_ray.server.refusals import refuse

BELOW = "/v1/"  # the door's paths; others may be those of other applications of this Serve
SAID = "No replica has answered; ask again, with the same Idempotency-Key if the request has one."


class ProxyAnswers:
    """An ASGI application around the proxy's own: what replicas answer passes as it is."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].startswith(BELOW):
            await self._app(scope, receive, send)
            return
        answered = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = not _is_proxys(message)
            if answered:
                await send(message)

        await self._app(scope, receive, sending)
        if not answered:
            await answer(refuse("unavailable", SAID), send)


def middlewares() -> list[Middleware]:
    """What Serve's proxies put around themselves; they call it by the name of it."""
    return [Middleware(ProxyAnswers)]


CALLBACK = f"{__name__}:{middlewares.__name__}"


def _is_proxys(start: MutableMapping[str, Any]) -> bool:
    """Whether an answer is the proxy's: the errors of a replica are JSON."""
    kinds = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return start["status"] in (404, 500, 503) and not any(kind.startswith(b"application/json") for kind in kinds)
