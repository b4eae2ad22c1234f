"""The manifest's lines as bytes: one JSON object per line, which begins with a checksum of the rest of it.

A last line that is not whole was never committed, and readers ignore it. Elsewhere torn bytes are damage, unless the
whole line behind them *vouches*: it has the number of whole lines before it. A writer does so behind torn bytes of
another writer, which has lost the run.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from edit_ray.errors import ManifestUnreadable
from edit_ray.runs.manifest import READABLE, SCHEMA, Begun, Committed, Line, Manifest, SegmentRecord

_HEAD = re.compile(rb'\{"crc": "([0-9a-f]{8})", (?:"behind": ([0-9]{1,18}), )?')
_STRICT = ConfigDict(strict=True, extra="forbid", cache_strings="keys")  # as every segment has the same keys
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")], config=_STRICT)
_NUMBERS: TypeAdapter[dict[str, float]] = TypeAdapter(
    dict[str, Annotated[float, Field(allow_inf_nan=False)]], config=ConfigDict(strict=True)
)
_BODY = len('{"crc": "00000000", ')
_BEGIN = b'{"crc": "'  # begins every line, and occurs nowhere else: quotes in texts are escaped
_STATISTICS = b'"statistics": {'  # occurs nowhere else either


def to_text(line: Line, behind: int | None = None) -> bytes:
    """A line with its end, as it is written; `behind` lines come before a line that vouches."""
    vouching = {} if behind is None else {"behind": behind}
    body = json.dumps(vouching | asdict(line), ensure_ascii=False)[1:].encode()
    return b'{"crc": "%08x", %b\n' % (zlib.crc32(body), body)


def read_back(text: bytes) -> Line:
    """A line of `to_text` as readers will see it. Raises ValueError where they could not read it."""
    head = _HEAD.match(text)
    assert head is not None
    return _parsed(text, head.end(), len(text))


class Fold:
    """The manifest that the lines of a file add up to. More of the file may be added at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._manifest: Manifest | None = None
        self._committed: list[SegmentRecord] = []  # while lines are added, those that `_manifest` lacks
        self._torn: str | None = None  # what is wrong with the bytes behind the last line that counts
        self._torn_at_end = False  # whether those may be a last line that is not whole
        self.size = 0  # bytes up to the end of the last line that counts
        self.lines = 0  # that count
        self.last = b""  # of them

    @property
    def manifest(self) -> Manifest:
        """The manifest of the lines up to `size`, of which there must be one."""
        assert self._manifest is not None
        return self._manifest

    @property
    def torn(self) -> bool:
        """Whether there are bytes behind `size` that no line vouches for."""
        return self._torn is not None

    def whole(self) -> Manifest:
        """The manifest, where nothing is damaged. Raises ManifestUnreadable."""
        if self._torn is not None and not (self._torn_at_end and self.lines):
            raise ManifestUnreadable(self._torn)
        if self._manifest is None:
            raise ManifestUnreadable(f"{self._path} has no whole line: it is empty, or was cut off; this is not a run")
        return self._manifest

    def add(self, content: bytes) -> set[int]:
        """Add the bytes of the file from `size` on; return the ends of those lines that have changed the manifest.

        Raises ManifestUnreadable for a whole line that cannot follow.
        """
        try:
            return self._add(content)
        finally:
            self._commit()

    def accept(self, manifest: Manifest, text: bytes, end: int) -> None:
        """Add a line that is known to result in this manifest, and ends at byte `end` of the file."""
        self._manifest = manifest
        self._count(text, end)

    def _add(self, content: bytes) -> set[int]:
        start, at, number, counting, view = self.size, 0, self.lines, set[int](), memoryview(content)
        self._torn = None
        while (end := content.find(b"\n", at)) >= 0:
            begin, number = at, number + 1
            head = _head_of(content, view, begin, end)
            if head is None:  # torn bytes may come before the line
                begin = max(content.rfind(_BEGIN, at, end), at)
                head = _head_of(content, view, begin, end)
            if head is None or begin > at:
                self._tear(number, last=begin == at)
            at = end + 1
            if head is None:
                continue
            if self._torn is not None and (head[2] is None or int(head[2]) != self.lines):
                self._torn_at_end = False
                continue
            try:
                if self._changed_by(content, head.end(), end):
                    counting.add(start + at)
            except ValueError as error:
                raise ManifestUnreadable(self._located(number, str(error))) from None
            self._count(content[begin:at], start + at)
        if at < len(content) and self.lines:
            self._tear(number + 1, last=True)
        return counting

    def _count(self, text: bytes, end: int) -> None:
        self.last, self.size, self._torn = text, end, None
        self.lines += 1

    def _tear(self, number: int, *, last: bool) -> None:
        self._torn_at_end = last and self._torn is None
        if self._torn is None:
            damage = "the line is damaged (its checksum does not fit), or this is not a manifest"
            self._torn = self._located(number, damage)

    def _located(self, number: int, damage: str) -> str:
        return f"{self._path}, line {number}: {damage}; the run cannot be read from here on"

    def _changed_by(self, content: bytes, begin: int, end: int) -> bool:
        """Add a line; return whether the manifest has changed. Raises ValueError where the line cannot follow."""
        before = self._manifest
        if before is None:
            _check_schema(b"{" + content[begin:end])
        line = _parsed(content, begin, end)
        if before is None:
            assert isinstance(line, Begun)
            self._manifest = Manifest.start(line)
        elif type(line) is Committed and line.incarnation == before.incarnation:
            before.check_follows(line.segment, len(self._committed))
            self._committed.append(line.segment)
            return True
        else:
            self._commit()
            before = self.manifest
            self._manifest = before.after(line)
        return self._manifest is not before

    def _commit(self) -> None:
        if self._committed:
            self._manifest = self.manifest.and_then(*self._committed)
            self._committed = []


class Statistics(Mapping[str, float]):
    """The statistics of a segment, parsed from its line on each access: 100,000 segments would hold 200 MB otherwise.

    A run does not depend on them: those that are not finite numbers are treated as missing, all of them.
    """

    __slots__ = ("_text",)

    def __init__(self, text: bytes) -> None:
        self._text = text

    def _read(self) -> dict[str, float]:
        try:
            return _NUMBERS.validate_json(self._text)
        except ValidationError:
            return {}

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def items(self) -> ItemsView[str, float]:  # that of `Mapping` parses the text again for each
        return self._read().items()


def _head_of(content: bytes, view: memoryview, begin: int, end: int) -> re.Match[bytes] | None:
    """The beginning of a line, if its checksum fits."""
    head = _HEAD.match(content, begin, end)
    return head if head is not None and int(head[1], 16) == zlib.crc32(view[begin + _BODY : end]) else None


def _parsed(content: bytes, begin: int, end: int) -> Line:
    """The line whose members are these bytes. Raises ValueError."""
    inside = content.find(_STATISTICS, begin, end) + len(_STATISTICS)
    if inside < len(_STATISTICS):
        return _validated(b"{%b" % content[begin:end])
    behind = content.find(b"}", inside, end)
    line = _validated(b"{%b%b" % (content[begin:inside], content[behind:end]))
    if type(line) is Committed:
        object.__setattr__(line.segment, "statistics", Statistics(content[inside - 1 : behind + 1]))
    return line


def _validated(text: bytes) -> Line:
    try:
        return _LINE.validate_json(text)
    except ValidationError as invalid:
        mistake = invalid.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, mistake["loc"])) or "the line"
        raise ValueError(f"{where:.80} is {mistake['input']!r:.60} ({mistake['msg']:.120})") from None


def _check_schema(text: bytes) -> None:
    """Raise ValueError where this is not the first line of a manifest, or one of another version."""
    values = json.loads(text)
    if values.get("kind") != "begun":
        raise ValueError("the first line of a manifest is missing")
    schema = values.get("schema")
    if schema not in READABLE:
        newer = "a newer" if isinstance(schema, int) and schema > SCHEMA else "another"
        known = " and ".join(map(str, reversed(READABLE)))
        raise ValueError(f"this is {newer} version's manifest (schema {schema!r:.20}; known here: {known})")
