"""The manifest's lines as bytes: one JSON object a line, which begins with a checksum of the rest of it.

A last line that is not whole was never committed, and readers pass over it. Elsewhere torn bytes are damage, unless the
whole line behind them *vouches*: it says how many whole lines come before it. A writer does so when a write of somebody
who has lost the run left torn bytes before its own line.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from edit_ray.errors import ManifestUnreadable
from edit_ray.runs.manifest import READABLE, SCHEMA, Begun, Line, Manifest

_HEAD = re.compile(rb'\{"crc": "([0-9a-f]{8})", (?:"behind": ([0-9]{1,18}), )?')
_LINE: TypeAdapter[Line] = TypeAdapter(
    Annotated[Line, Field(discriminator="kind")],
    config=ConfigDict(strict=True, extra="forbid", cache_strings="keys"),  # as every segment has the same keys
)
_BODY = len('{"crc": "00000000", ')
_BEGIN = b'{"crc": "'  # begins every line, and stands nowhere else: quotes in texts are escaped


def to_text(line: Line, behind: int | None = None) -> bytes:
    """A line as it is written, with its end; one that vouches says how many lines come before it."""
    vouching = {} if behind is None else {"behind": behind}
    body = json.dumps(vouching | asdict(line), ensure_ascii=False)[1:].encode()
    return b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body)


def from_bytes(content: bytes, path: Path) -> tuple[Manifest, int]:
    """The manifest, and how many bytes of the content are whole lines. Raises ManifestUnreadable."""
    fold = Fold(path)
    fold.add(content)
    return fold.whole(), fold.size


class Fold:
    """The manifest that the lines of a file give. More of the file may be added at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifest: Manifest | None = None
        self._torn: str | None = None  # what is wrong with the bytes behind the last line that counts
        self._torn_at_end = False  # whether those may be a last line that is not whole
        self.size = 0  # bytes up to the end of the last line that counts
        self.lines = 0  # that count
        self.last = b""  # of them

    @property
    def manifest(self) -> Manifest:
        """What the lines up to `size` give; there must be one."""
        assert self._manifest is not None
        return self._manifest

    @property
    def torn(self) -> bool:
        """Whether there are bytes behind `size` of which no line vouches that they are none."""
        return self._torn is not None

    def whole(self) -> Manifest:
        """The manifest, where nothing is damaged. Raises ManifestUnreadable."""
        if self._torn is not None and not (self._torn_at_end and self.lines):
            raise ManifestUnreadable(self._torn)
        if self._manifest is None:
            raise ManifestUnreadable(f"{self._path} has no whole line: it is empty, or was cut off; this is no run")
        return self._manifest

    def add(self, content: bytes) -> set[int]:
        """Adds the bytes of the file from `size` on; returns where those lines end that have changed the manifest.

        Raises ManifestUnreadable for a whole line that cannot follow.
        """
        start, at, number, counting = self.size, 0, self.lines, set()
        self._torn = None
        while (end := content.find(b"\n", at)) >= 0:
            begin = max(content.rfind(_BEGIN, at, end), at)
            torn_before, line = begin > at, content[begin:end]
            at, number = end + 1, number + 1
            head = _HEAD.match(line)
            if head is None or head[1] != b"%08x" % zlib.crc32(line[_BODY:]):
                self._tear(number, last=not torn_before)
                continue
            if torn_before:
                self._tear(number, last=False)
            if self._torn is not None and (head[2] is None or int(head[2]) != self.lines):
                self._torn_at_end = False
                continue
            try:
                followed = self._followed_by(_json_of(line, head))
            except ValueError as error:
                raise ManifestUnreadable(self._said(number, str(error))) from None
            if followed is not self._manifest:
                counting.add(start + at)
            self.accept(followed, line + b"\n", start + at)
        if at < len(content) and self.lines:
            self._tear(number + 1, last=True)
        return counting

    def accept(self, manifest: Manifest, text: bytes, end: int) -> None:
        """The manifest with one line more, which ends at byte `end` of the file."""
        self._manifest, self.last, self.size, self._torn = manifest, text, end, None
        self.lines += 1

    def _tear(self, number: int, *, last: bool) -> None:
        self._torn_at_end = last and self._torn is None
        if self._torn is None:
            damage = "the line is damaged (its checksum does not fit), or this is no manifest"
            self._torn = self._said(number, damage)

    def _said(self, number: int, damage: str) -> str:
        return f"{self._path}, line {number}: {damage}; the run cannot be read from here on"

    def _followed_by(self, text: bytes) -> Manifest:
        if self._manifest is not None:
            return self._manifest.after(_parsed(text))
        _check_schema(text)
        first = _parsed(text)
        assert isinstance(first, Begun)
        return Manifest.start(first)


def read_back(text: bytes) -> Line:
    """What readers will find a line of `to_text` to be. Raises ValueError where they could not read it."""
    head = _HEAD.match(text)
    assert head is not None
    return _parsed(_json_of(text, head))


def _json_of(text: bytes, head: re.Match[bytes]) -> bytes:
    return b"{" + text[head.end() :]


def _parsed(text: bytes) -> Line:
    try:
        return _LINE.validate_json(text)
    except ValidationError as invalid:
        mistake = invalid.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, mistake["loc"])) or "the line"
        raise ValueError(f"{where:.80} is {mistake['input']!r:.60} ({mistake['msg']:.120})") from None


def _check_schema(text: bytes) -> None:
    """Raises ValueError where this is no first line of a manifest, or one of another version."""
    values = json.loads(text)
    if values.get("kind") != "begun":
        raise ValueError("the first line of a manifest is missing")
    schema = values.get("schema")
    if schema not in READABLE:
        newer = "a newer" if isinstance(schema, int) and schema > SCHEMA else "another"
        known = " and ".join(map(str, reversed(READABLE)))
        raise ValueError(f"this is {newer} version's manifest (schema {schema!r:.20}; known here: {known})")
