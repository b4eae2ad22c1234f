"""What happened to a run and when: one line of JSON for each event, appended and never changed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edit_ray import files

_CHUNK = 1 << 20


def append_event(path: Path, event: str, **fields: int | float | str | Mapping[str, float] | None) -> None:
    """Add a line with the name of the event, `wall` (seconds since 1970), `monotonic` (seconds, comparable only within
    one node) and `fields`, in one write, so that lines of several processes do not mix.

    An event that cannot be written is omitted: no run fails because of its log.
    """
    text = json.dumps({"event": event, "wall": time.time(), "monotonic": time.monotonic(), **fields}) + "\n"
    with suppress(OSError):
        files.append_line(path, text.encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event, in order; none where no log can be read. Lines that are torn, or are not events, are skipped."""
    try:
        lines = files.read_bytes(path).split(b"\n")
    except OSError:
        return []
    return [event for line in lines if (event := _event_of(line)) is not None]


def latest_events(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The events of one name, the latest first. Reads no more of the log than the caller consumes."""
    mark = json.dumps({"event": name})[1:-1].encode()
    with suppress(OSError), files.opened(path) as log:
        end, later = os.fstat(log).st_size, b""  # the end of a line that begins before the bytes that were read
        while end > 0:
            begin = max(0, end - _CHUNK)
            lines = files.read_at(log, begin, end - begin) + later
            later, _, lines = lines.partition(b"\n") if begin else (b"", b"", lines)
            for line in reversed(lines.split(b"\n")) if mark in lines else ():
                if mark in line and (event := _event_of(line)) is not None and event["event"] == name:
                    yield event
            end = begin


def events_behind(path: Path, offset: int | None) -> tuple[list[dict[str, Any]], int]:
    """The events of whole lines behind byte `offset` of the log, of about 1 MiB at most, and the offset behind them.

    None: no events, and the end of the log.
    """
    with suppress(OSError), files.opened(path) as log:
        size = os.fstat(log).st_size
        if offset is None or offset > size:
            return [], size
        lines = files.read_at(log, offset, min(size - offset, _CHUNK))
        whole = lines[: lines.rfind(b"\n") + 1]
        if not whole and len(lines) == _CHUNK:  # no event is as long
            return [], offset + _CHUNK
        events = [event for line in whole.split(b"\n") if (event := _event_of(line)) is not None]
        return events, offset + len(whole)
    return [], offset or 0


def _event_of(line: bytes) -> dict[str, Any] | None:
    """The event of a line, if it has what every event has and its fields have the types that readers rely on."""
    try:
        event = json.loads(line, parse_constant=int)  # which refuses NaN and Infinity
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or type(event.get("event")) is not str:
        return None
    figures = event.get("figures", {})
    numbers = [event.get("wall"), event.get("monotonic"), *(figures.values() if isinstance(figures, dict) else [None])]
    counts = [event[name] for name in ("segment", "take", "edits", "attempt", "worker") if name in event]
    valid = all(type(number) in (int, float) and math.isfinite(number) for number in numbers) and all(
        type(count) is int and count >= 0 for count in counts
    )
    return event if valid else None
