"""Measurements in a file, so that a search that was interrupted continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edit_ray.files import append_line, read_bytes

_LINES = {"about"}, {"name", "video", "found"}  # the keys of the first line, and of the others


class Journal:
    """Numbers by the name of what was measured and by the video, one line of JSON each; a torn last line is ignored.

    Args:
        path: The file; None keeps nothing.
        about: What the measurements depend on. A search of something else cannot continue from them.

    Raises:
        ValueError: the file is of something else, or no journal.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path = path
        self._known: dict[tuple[str, int], list[float]] = {}
        if path is None:
            return
        lines = list(_lines(path))
        if not lines:
            self._append({"about": dict(about)})
        elif lines[0].get("about") != json.loads(json.dumps(about)):
            raise ValueError(f"{path} has measurements of another model, prompts or sampling; give another file.")
        for line in lines[1:]:
            self._known[str(line["name"]), int(line["video"])] = line["found"]

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str, video: int) -> list[float] | None:
        """What was found; None if it is not known."""
        return self._known.get((name, video))

    def put(self, name: str, video: int, found: Sequence[float]) -> None:
        """Note what was found."""
        self._known[name, video] = list(found)
        if self.path is not None:
            self._append({"name": name, "video": video, "found": list(found)})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        append_line(self.path, json.dumps(line).encode() + b"\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file. Raises ValueError."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return
    for line in content.splitlines():
        try:
            parsed = json.loads(line)
        except ValueError:  # torn by a crash; it is measured again
            continue
        if not isinstance(parsed, dict) or not any(keys <= set(parsed) for keys in _LINES):
            raise ValueError(f"{path} is no file of measurements.")
        yield parsed
