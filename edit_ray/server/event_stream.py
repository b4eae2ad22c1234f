"""A run's events for readers that follow it, with ids behind which any replica continues.

What is sent follows from the run's manifest and its event log, not from what a replica has seen: an id says how many
takes and segments a reader knows, and how many bytes of the log: `0-12-3456`. A re-roll sends the segments that it
replaces again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edit_ray.runs.event_log import events_behind
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest
from edit_ray.server.video_object import as_json, segment_of

POLL_S = 1.0  # between two looks at a run
KEEP_ALIVE_S = 15.0  # without an event, after which a comment is sent: proxies close silent connections
AT_ONCE = 100  # segments in one look, so that a reader of a long run fills no memory

_ID = re.compile(r"([0-9]{1,9})-([0-9]{1,9})-([0-9]{1,15})")
_LOGGED = "segment_begun"


@dataclass(frozen=True)
class Cursor:
    """What a reader knows: of so many takes the segments before `segments`, and so many bytes of the event log.

    `log` None: whatever is in the log is of the past, and is not sent.
    """

    takes: int = 0
    segments: int = 0
    log: int | None = None

    @classmethod
    def of(cls, last_event_id: str | None) -> Cursor:
        """The cursor of a `Last-Event-ID`; the beginning where there is none, or it is none of ours."""
        match = _ID.fullmatch(last_event_id or "")
        return cls(*map(int, match.groups())) if match else cls()

    def __str__(self) -> str:
        return f"{self.takes}-{self.segments}-{self.log or 0}"

    def next_in(self, manifest: Manifest) -> int:
        """The first segment that the reader does not know: one that was not sent, or was replaced since."""
        return min([self.segments, *(take.start for take in manifest.takes[self.takes :])])


@dataclass(frozen=True)
class News:
    """What there is to send: bytes, and where the reader is then. `ended`: nothing will follow, as things are."""

    sent: bytes
    cursor: Cursor
    status: dict[str, Any]
    ended: bool


def message(event: str, data: Mapping[str, Any], cursor: Cursor | None = None) -> bytes:
    """One event as Server-Sent Events have it. Without a cursor it has no id, and is not sent again."""
    named = f"id: {cursor}\n" if cursor is not None else ""
    return f"{named}event: {event}\ndata: {json.dumps(data)}\n\n".encode()


def news(
    folder: RunFolder, manifest: Manifest, status: dict[str, Any], cursor: Cursor, known: Mapping[str, Any]
) -> News:
    """The events since `cursor`; `status` is the video object, `known` the one that the reader was told last.

    `segment`: a segment is committed, or replaced. `begun`: one is being denoised, in an attempt from 0. `status`: the
    video object has changed. `ended`: the run has ended; it may be continued later.
    """
    sent = list[bytes]()
    for index in range(first := cursor.next_in(manifest), min(len(manifest.segments), first + AT_ONCE)):
        cursor = Cursor(len(manifest.takes), index + 1, cursor.log)
        sent.append(message("segment", as_json(segment_of(manifest, manifest.segments[index])), cursor))
    logged, end = events_behind(folder.events, cursor.log)
    cursor = replace(cursor, log=end)
    sent += [message("begun", begun, cursor) for begun in _begun(logged)]
    if status is not known and status != known:
        sent.append(message("status", status))
    ended = manifest.end is not None and cursor.next_in(manifest) >= len(manifest.segments)
    if ended:
        sent.append(
            message("ended", {"status": status["status"], "state": manifest.state, "error": status["error"]}, cursor)
        )
    return News(b"".join(sent), cursor, status, ended)


def nothing_more(manifest: Manifest, cursor: Cursor) -> bool:
    """Whether a reader at `cursor` has been told all of a run that has ended: it need not ask again."""
    return (
        manifest.end is not None
        and cursor.log is not None
        and cursor.takes == len(manifest.takes)
        and cursor.segments >= len(manifest.segments)
    )


def _begun(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in events:
        if event["event"] == _LOGGED:
            yield {name: event[name] for name in ("segment", "attempt", "wall") if name in event}
