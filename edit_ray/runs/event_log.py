"""What happened to a run and when: one line of JSON for each event, appended and never changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def append_event(path: Path, event: str, **fields: int | float | str | Mapping[str, float] | None) -> None:
    """Adds a line with the name of the event, `wall` (seconds since 1970), `monotonic` (seconds, to be compared only
    with those of one node) and `fields`. It is written at once, so that lines of several processes do not mix.
    """
    line = json.dumps({"event": event, "wall": time.time(), "monotonic": time.monotonic(), **fields}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event, in order; none where there is no log. Lines that were torn are left out."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events
