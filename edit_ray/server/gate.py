"""What every request passes before the door's routes: whose it is, how large, how slow, and how many there are."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from threading import Lock
from typing import Any

from edit_ray.errors import ConfigError
from edit_ray.page.run_server import HEADERS, LOOPBACK
from edit_ray.server.refusals import Refusal, refuse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

COOKIE = "edit_ray_session"
REFUSED = "edit_ray.refused"  # in a request's scope: the code of the refusal that is its answer
OPEN = ("/healthz", "/", "/session")  # without a token; the page and its files tell nothing
OPEN_BELOW = "/page/"
MIN_TOKEN = 16  # characters


@dataclass(frozen=True)
class Limits:
    """What a replica accepts.

    Bytes of a body, seconds until it is there, and requests that change something or read, a second and at once.
    `readers` are those that follow a run's events. New videos are refused while `queued` wait in the cluster.
    """

    body_bytes: int = 96 << 20
    body_s: float = 60.0
    changes_per_s: float = 5.0
    changes_at_once: int = 50
    reads_per_s: float = 500.0
    reads_at_once: int = 1000
    readers: int = 1000
    queued: int = 1000


@dataclass(frozen=True)
class Entrance:
    """Who may come in: the `host` that is listened on, the names by which it is asked, and the token.

    Raises ConfigError where the address is not this machine's own and there is no token of at least `MIN_TOKEN`
    characters.
    """

    host: str = LOOPBACK
    port: int = 0
    token: str | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        token = self.token
        if token is None and not self.is_local:
            said = f"it must be {LOOPBACK} without a token; with one (--token-file) it may be any."
            raise ConfigError([f"--host is {self.host!r}; {said}"])
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
            said = f"it must be {MIN_TOKEN} or more printable characters of ASCII."
            raise ConfigError([f"the token has {len(token)} characters; {said}"])

    @property
    def is_local(self) -> bool:
        return self.host in (LOOPBACK, "localhost", "::1")

    @property
    def cookie(self) -> str:
        """What a browser holds in place of the token, from which the token cannot be had."""
        return hmac.digest((self.token or "").encode(), b"edit_ray session", hashlib.sha256).hex()

    def refusal(self, path: str, headers: Mapping[str, str]) -> Refusal | None:
        """Why a request is refused, whose headers have lower-case names; None if it is not."""
        host = headers.get("host", "")
        if not self._answers_to(host):  # against DNS rebinding: a foreign page's name that leads here
            return refuse("wrong_host", "The Host of the request is none of this server's names (--allow-host NAME).")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return refuse("wrong_origin", "The Origin of the request is another site's, which may not use this server.")
        is_open = path in OPEN or path.startswith(OPEN_BELOW)
        if self.token is not None and not is_open and not self._knows_token(headers):
            return refuse(
                "invalid_api_key", "The request has no valid token; it must have Authorization: Bearer TOKEN."
            )
        return None

    def is_token(self, given: str) -> bool:
        """Whether it is the token, in a time that does not depend on how much of it is right."""
        return hmac.compare_digest(given.encode(errors="surrogateescape"), (self.token or "").encode())

    def _knows_token(self, headers: Mapping[str, str]) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.is_token(given.strip())
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return morsel is not None and hmac.compare_digest(morsel.value.encode(), self.cookie.encode())

    def _answers_to(self, host: str) -> bool:
        if not self.is_local and not self.names:
            return True  # behind a token, and under names that only its operator knows
        known = (LOOPBACK, "localhost", "[::1]", *self.names) if self.is_local else (self.host, *self.names)
        return host in {*known, *(f"{name}:{self.port}" for name in known)} if self.port else host in known


class TokenBucket:
    """So many a second on average, and `at_once` at most. `now` is in monotonic seconds."""

    def __init__(self, per_s: float, at_once: int) -> None:
        self._per_s, self._most, self._left, self._at = per_s, float(at_once), float(at_once), 0.0
        self._lock = Lock()

    def take(self, now: float) -> bool:
        """Whether one more may come now."""
        with self._lock:
            self._left = min(self._most, self._left + max(0.0, now - self._at) * self._per_s)
            self._at = max(now, self._at)
            if self._left < 1:
                return False
            self._left -= 1
            return True


class Gate:
    """An ASGI application before another one, which it asks only what the entrance and the limits let through."""

    def __init__(
        self, app: Any, entrance: Entrance, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app, self._entrance, self._limits, self._clock = app, entrance, limits, clock
        self._changes = TokenBucket(limits.changes_per_s, limits.changes_at_once)
        self._reads = TokenBucket(limits.reads_per_s, limits.reads_at_once)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal(scope)) is not None:
            scope[REFUSED] = refusal.code
            await answer(refusal, send)
            return
        await self._app(scope, _Body(receive, self._limits, self._clock), _with_headers(send))

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers, twice = _headers_of(scope["headers"])
        if twice:
            return refuse("invalid_request", f"The header {twice} is given twice; it must be given once.")
        if (refusal := self._entrance.refusal(scope["path"], headers)) is not None:
            return refusal
        bucket = self._reads if scope["method"] in ("GET", "HEAD") else self._changes
        if not bucket.take(self._clock()):
            return refuse("rate_limited", "There are more requests than this server takes; ask again a little later.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            return refuse("invalid_request", "The header content-length is no number.")
        return _too_large(self._limits) if int(length) > self._limits.body_bytes else None


class _Body:
    """A request's body, which may have so many bytes and take so long. A call raises Refusal beyond."""

    def __init__(self, receive: Receive, limits: Limits, clock: Callable[[], float]) -> None:
        self._receive, self._limits, self._clock = receive, limits, clock
        self._bytes, self._whole, self._until = 0, False, clock() + limits.body_s

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._whole:  # what follows is that the client leaves, which may take any time
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._until - self._clock())):
                message = await self._receive()
        except TimeoutError:
            said = f"The body was not there within {self._limits.body_s:g} s."
            raise refuse("too_slow", said) from None
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise _too_large(self._limits)
        return message


def _too_large(limits: Limits) -> Refusal:
    return refuse("too_large", f"The body has more than the {limits.body_bytes} bytes that it may have.")


_ONCE = (
    "host",
    "origin",
    "authorization",
    "content-length",
    "content-type",
    "idempotency-key",
    "last-event-id",
    "range",
)


def _headers_of(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[str, str], str | None]:
    """The headers by lower-case name, and one that is there twice and must not be."""
    found: dict[str, str] = {}
    for name, value in raw:
        key = name.decode("latin-1").lower()
        if key in found and key in _ONCE:
            return found, key
        found[key] = value.decode("latin-1")
    return found, None


def _with_headers(send: Send) -> Send:
    """Adds what every answer to a browser says."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(pair for pair in _ALWAYS if pair[0] not in there)]
        await send(message)

    return sending


_ALWAYS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


async def answer(refusal: Refusal, send: Send) -> None:
    """Send a refusal."""
    body = json.dumps(refusal.body).encode()
    about = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    headers = [*_ALWAYS, *((name.lower().encode(), value.encode()) for name, value in about.items())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
