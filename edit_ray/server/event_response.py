"""The answer to a reader of events: it has one of a replica's places from before its first byte until it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from starlette.responses import StreamingResponse

from edit_ray.server.gate import Receive, Scope, Send
from edit_ray.server.refusals import refuse

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ReaderPlaces:
    """So many readers of events at once. Only one event loop may ask."""

    def __init__(self, count: int) -> None:
        self._count, self._taken = count, 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have a place during the block. Raises Refusal if there is none."""
        if self._taken >= self._count:
            raise refuse("unavailable", f"This replica has {self._taken} readers of events; it takes no more.")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class EventResponse(StreamingResponse):
    """Server-Sent Events.

    The place is taken here, and not by what makes the events: between the answer and its first event other requests are
    looked at, and a client that leaves before that event would never have had its events begun, nor ended.
    """

    def __init__(self, events: AsyncIterator[bytes], places: ReaderPlaces) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, or the client leaves. Raises Refusal if there are too many readers."""
        with self._places.taken():
            await super().__call__(scope, receive, send)
