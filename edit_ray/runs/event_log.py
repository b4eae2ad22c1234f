"""What happened to a run and when: one line of JSON for each event, appended and never changed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edit_ray import files


def append_event(path: Path, event: str, **fields: int | float | str | Mapping[str, float] | None) -> None:
    """Adds a line with the name of the event, `wall` (seconds since 1970), `monotonic` (seconds, to be compared only
    with those of one node) and `fields`, in one write, so that lines of several processes do not mix.

    What cannot be written is left out: no run fails for its log.
    """
    text = json.dumps({"event": event, "wall": time.time(), "monotonic": time.monotonic(), **fields}) + "\n"
    with suppress(OSError):
        files.append_line(path, text.encode())


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event, in order; none where no log can be read. Lines that are torn, or are no events, are left out."""
    try:
        lines = files.read_bytes(path).split(b"\n")
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            event = json.loads(line, parse_constant=_refuse)
            if _is_event(event):
                events.append(event)
    return events


def _is_event(value: Any) -> bool:
    """Whether it has what every event has, and each field that readers rely on is of its type."""
    if not isinstance(value, dict) or type(value.get("event")) is not str:
        return False
    figures = value.get("figures", {})
    numbers = [value.get("wall"), value.get("monotonic"), *(figures.values() if isinstance(figures, dict) else [None])]
    counts = [value[name] for name in ("segment", "take", "attempt", "worker") if name in value]
    return all(type(number) in (int, float) and math.isfinite(number) for number in numbers) and all(
        type(count) is int and count >= 0 for count in counts
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
