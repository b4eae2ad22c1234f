"""A strict subset of YAML: plain mappings, lists and scalars, each key once, of bounded depth and size.

Plain scalars follow YAML 1.2's core schema: `no` and `1:30` are text, `1e6` is a number. Tags, anchors, aliases and a
second document are mistakes; reading continues, to find all of them.
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
    """The data (None if empty or invalid), the line of every key, and the mistakes with their lines."""

    data: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    mistakes: list[tuple[int | None, str]] = field(default_factory=list)

    def note(self, at: Any, text: str) -> None:
        """Record a mistake on the line of `at`, an event or node of PyYAML."""
        self.mistakes.append((at.start_mark.line + 1, text))


class _TooMuch(Exception):
    """Too deep or too large to read on."""


def parse(text: str) -> Document:
    """Read one document. Never raises: every mistake is in the result."""
    document = Document()
    try:
        composer: Any = _Composer(text, document)  # raises for characters that YAML forbids
        composer.get_event()
        if not composer.check_event(yaml.StreamEndEvent):
            document.data = _value(composer.compose_document())
        if document.data is None and not document.mistakes:
            document.mistakes.append((None, EMPTY))
        if not composer.check_event(yaml.StreamEndEvent):
            document.note(composer.peek_event(), "a second YAML document begins here; there must be one.")
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
    """The value of a scalar on the command line: text if quoted, else a plain scalar. Raises ValueError."""
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
    return float(text.replace(".", "")) if _SPECIAL.fullmatch(text) else text


def dump(data: dict[str, Any]) -> str:
    """YAML that `parse` reads back to equal data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML loses other line breaks than \n outside of double quotes.
    quoted = not isinstance(resolve(text), str) or any(line_break in text for line_break in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


class _Composer(yaml.SafeLoader):
    """Composes nodes and records each key's line and everything not allowed; an alias becomes an empty value."""

    def __init__(self, text: str, document: Document) -> None:
        super().__init__(text)
        self._document, self._depth, self._nodes = document, 0, 0
        self._path: KeyPath = ()
        self._seen: set[tuple[int, str]] = set()  # mapping and key

    def compose_node(self, parent: Any, index: Any) -> Any:
        stream: Any = super()  # PyYAML's methods have no types
        event, above = stream.peek_event(), self._path
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        odd_key = parent is not None and index is None and not isinstance(event, yaml.ScalarEvent)
        if odd_key:
            self._document.note(event, f"a key of {dotted(above) or 'the document'} is not plain text.")
        elif isinstance(index, int):
            self._path = (*above, index)
            self._document.lines[self._path] = event.start_mark.line + 1
        elif index is not None:  # a mapping's key
            self._path = (*above, self._key(parent, index))
        self._check(event, dotted(self._path) or "the document")
        if isinstance(event, yaml.AliasEvent):
            mark = stream.get_event().start_mark
            node: Any = yaml.ScalarNode("", f"(key in line {mark.line + 1})" if odd_key else "", mark)
        else:
            node = stream.compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
            self._document.note(node, "a half of a surrogate pair is not a character; write the character itself.")
            node.value = node.value.encode("utf-8", "replace").decode()
        self._path, self._depth = above, self._depth - 1
        return node

    def _key(self, mapping: yaml.Node, node: yaml.Node) -> str:
        key, here = _key(node), (*self._path, _key(node))
        if (id(mapping), key) in self._seen:
            first = self._document.lines[here]
            self._document.note(node, f"{dotted(here)} is given twice, first in line {first}; each key is given once.")
        self._seen.add((id(mapping), key))
        self._document.lines.setdefault(here, node.start_mark.line + 1)
        return key

    def _check(self, event: Any, at: str) -> None:
        if self._depth > MAX_DEPTH or self._nodes > MAX_NODES:
            bound = (
                f"nested deeper than {MAX_DEPTH} levels" if self._depth > MAX_DEPTH else f"of over {MAX_NODES} values"
            )
            self._document.note(event, f"the YAML is {bound} here; no configuration needs that.")
            raise _TooMuch
        if isinstance(event, yaml.AliasEvent):
            says = f"is the alias *{event.anchor}; aliases are not allowed, write the value out."
            self._document.note(event, f"{at} {says}")
            return
        if event.anchor is not None:
            self._document.note(event, f"{at} has the anchor &{event.anchor}; anchors are not allowed.")
            event.anchor = None
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._document.note(event, f"{at} has the tag {tag}; tags are not allowed, only plain values are.")


def _key(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else f"(key in line {node.start_mark.line + 1})"


def _value(node: Any) -> Any:
    """The data of a node."""
    if isinstance(node, yaml.ScalarNode):
        return resolve(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    return {_key(key): _value(value) for key, value in node.value}
