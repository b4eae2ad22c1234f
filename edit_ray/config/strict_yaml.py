"""YAML without its traps: plain mappings, lists and scalars, each key once, everything bounded.

Plain scalars are read as YAML 1.2's core schema has them, so `no` and `1:30` are text and `1e6` is a number. Tags,
anchors, aliases and a second document are refused, and reading goes on to find the next mistake.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from edit_ray.config.mistakes import KeyPath, dotted

EMPTY = "this is empty; it must have at least video and prompt_segments."
MAX_DEPTH = 16
MAX_NODES = 60_000

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?[0-9]{1,100}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


@dataclass
class Document:
    """What was read: the data (None where there is none), the line of every key, and the mistakes with their lines."""

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    mistakes: list[tuple[int | None, str]] = field(default_factory=list)


class _TooMuch(Exception):
    """Reading must stop: the rest may be without bound."""


def parse(text: str) -> Document:
    """Reads one document; never raises, every mistake is in the result."""
    document = Document()
    try:
        _Reader(text, document).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        document.data = None
        document.mistakes.append((mark.line + 1 if mark else None, f"this is not valid YAML: {problem}."))
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets the ValueError of an impossible escape such as "\UFFFFFFFF" through.
        document.data = None
        document.mistakes.append((None, f"this is not valid YAML text: {getattr(error, 'reason', error)}."))
    except _TooMuch:
        document.data = None
    return document


def parse_scalar(text: str) -> Any:
    """The value of one scalar as a command line gives it: in quotes it is text, else it is what it looks like."""
    if text[:1] in ("'", '"'):
        document = parse(text)
        if document.mistakes or not isinstance(document.data, str):
            raise ValueError("the quotes do not enclose one text")
        return document.data
    return resolve(text.strip())


def resolve(text: str) -> Any:
    """The value of a plain scalar."""
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def dump(data: dict[str, Any]) -> str:
    """YAML that `parse` reads back to equal data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes whatever this module would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML loses other line breaks than \n outside of double quotes.
    quoted = not isinstance(resolve(text), str) or any(line_break in text for line_break in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


class _Reader:
    """Builds the data from PyYAML's events, which resolve nothing and construct nothing."""

    def __init__(self, text: str, document: Document) -> None:
        # The loader looks for characters that YAML forbids, and raises.
        self._loader: Any = yaml.SafeLoader(text)
        self._document = document
        self._nodes = 0

    def read(self) -> None:
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            self._mistake(None, EMPTY)
            return
        self._document.data = self._value(self._next(), (), 1)
        if self._document.data is None and not self._document.mistakes:
            self._mistake(None, EMPTY)
        self._next()
        following = self._next()
        if isinstance(following, yaml.DocumentStartEvent):
            self._mistake(following, "a second YAML document begins here; there must be one.")

    def _next(self) -> Any:
        return self._loader.get_event()

    def _mistake(self, event: Any, text: str) -> None:
        self._document.mistakes.append((event.start_mark.line + 1 if event else None, text))

    def _value(self, event: Any, path: KeyPath, depth: int) -> Any:
        self._check(event, path, depth)
        if isinstance(event, yaml.ScalarEvent):
            return self._plain(event) if event.style is None else self._characters(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path, depth)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path, depth)
        return None

    def _check(self, event: Any, path: KeyPath, depth: int) -> None:
        at = dotted(path) or "the document"
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            bound = f"nested deeper than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"of over {MAX_NODES} values"
            self._mistake(event, f"the YAML is {bound} here; no configuration needs that.")
            raise _TooMuch
        if isinstance(event, yaml.AliasEvent):
            self._mistake(event, f"{at} is the alias *{event.anchor}; aliases are not allowed, write the value out.")
        elif event.anchor is not None:
            self._mistake(event, f"{at} has the anchor &{event.anchor}; anchors are not allowed.")
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._mistake(event, f"{at} has the tag {tag}; tags are not allowed, only plain values are.")

    def _plain(self, event: Any) -> Any:
        return resolve(self._characters(event))

    def _characters(self, event: Any) -> str:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._mistake(event, "a half of a surrogate pair is no character; write the character itself.")
            return text.encode("utf-8", "replace").decode()
        return text

    def _list(self, path: KeyPath, depth: int) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            here = (*path, len(values))
            self._document.lines[here] = event.start_mark.line + 1
            values.append(self._value(event, here, depth + 1))
        return values

    def _mapping(self, path: KeyPath, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._key(event, path, depth)
            here = (*path, key)
            line = event.start_mark.line + 1
            if key in values:
                first = self._document.lines[here]
                self._mistake(event, f"{dotted(here)} is given twice, first in line {first}; each key is given once.")
            else:
                self._document.lines[here] = line
            values[key] = self._value(self._next(), here, depth + 1)
        return values

    def _key(self, event: Any, path: KeyPath, depth: int) -> str:
        if isinstance(event, yaml.ScalarEvent):
            self._check(event, path, depth)
            return self._characters(event)
        self._mistake(event, f"a key of {dotted(path) or 'the document'} is no plain text.")
        self._value(event, path, depth + 1)
        return f"(key in line {event.start_mark.line + 1})"
