"""Mistakes in a configuration: the key of each, and a sentence about it."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from edit_ray.options import Schema, describe, node_at

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """`text` is a sentence. It derives from the keys `needs` too, and is dropped if one of them is wrong."""

    path: KeyPath
    text: str
    needs: tuple[KeyPath, ...] = ()


class Mistakes(ValueError):
    """Raised by cross-field checks: each mistake is a conflict between keys that are valid on their own."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__(" ".join(mistake.text for mistake in self.mistakes))


class WrongKeys:
    """The wrong keys, to drop mistakes that derive from them."""

    def __init__(self, paths: Iterable[KeyPath] = ()) -> None:
        self.paths: set[KeyPath] = set()
        self._above: set[KeyPath] = set()
        for path in paths:
            self.add(path)

    def add(self, path: KeyPath) -> None:
        self.paths.add(path)
        self._above.update(_upwards(path))

    def touch(self, path: KeyPath) -> bool:
        """Whether the key, one below it or one above it is wrong."""
        return path in self._above or any(above in self.paths for above in _upwards(path))

    def spoil(self, mistake: Mistake) -> bool:
        """Whether the mistake derives from a wrong key."""
        return any(self.touch(path) for path in (mistake.path, *mistake.needs))


def mistake_at(key: str | KeyPath, says: str, *needs: str) -> Mistake:
    """A mistake whose sentence is the dotted key and `says`. `needs` are dotted keys."""
    path = tuple(key.split(".")) if isinstance(key, str) else key
    return Mistake(path, f"{dotted(path)} {says}", tuple(tuple(need.split(".")) for need in needs))


def dotted(path: KeyPath) -> str:
    """The path in the syntax of `--set`: `prompt_segments.1.prompt`."""
    return ".".join(map(str, path))


def _upwards(path: KeyPath) -> Iterator[KeyPath]:
    return (path[:length] for length in range(len(path), -1, -1))


def mistakes_of(error: ValidationError, schema: Schema) -> list[Mistake]:
    """One mistake per wrong key. `schema` is the JSON schema of the model that was validated."""
    errors = error.errors(include_url=False)
    paths = [tuple(item["loc"]) for item in errors]
    found: list[Mistake] = []
    for item, path in zip(errors, paths, strict=True):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Mistakes):
            found += cause.mistakes
        # Pydantic also calls a list with wrong entries too short, because it counts the right ones.
        elif item["type"] != "too_short" or not any(path == other[: len(path)] != other for other in paths):
            found.append(Mistake(path, _sentence(item["type"], path, item["input"], cause, schema)))
    return found


def _sentence(kind: str, path: KeyPath, given: object, cause: object, schema: Schema) -> str:
    if kind == "extra_forbidden":
        near = nearest_key(path, schema)
        hint = f"; did you mean {near}?" if near else "."
        return f"{dotted(path)} is an unknown key{hint} (Known here: {', '.join(_properties(path[:-1], schema))}.)"
    node = node_at(path, schema)
    if kind == "value_error" and node.get("type") == "object":
        return f"{dotted(path)} {cause}"
    what = "missing" if kind == "missing" else show(given)
    return f"{dotted(path) or 'the configuration'} is {what}; it must be {describe(node, schema)}."


def show(value: object) -> str:
    """A value in a few characters, in YAML's notation."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    text = str(value)
    if isinstance(value, str):
        return repr(text) if len(text) <= 60 else f"{repr(text[:40])[:-1]}…' ({len(text)} characters)"
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} digits)"


def nearest_key(path: KeyPath, schema: Schema) -> str | None:
    """The dotted key that the last part of `path` most likely means."""
    name, siblings = str(path[-1]), list(_properties(path[:-1], schema))
    elsewhere = {
        leaf: f"{section}.{leaf}" for section in schema["properties"] for leaf in _properties((section,), schema)
    }
    if name in elsewhere:
        return elsewhere[name]
    here = {known: dotted((*path[:-1], known)) for known in siblings}
    if parts := [known for known in siblings if len(name) > 2 and (name in known or known in name)]:
        return here[parts[0]]
    for places, cutoff in ((here, 0.6), (elsewhere, 0.75), (here, 0.4)):
        if close := difflib.get_close_matches(name, places, n=1, cutoff=cutoff):
            return places[close[0]]
    return None


def _properties(path: KeyPath, schema: Schema) -> Mapping[str, Schema]:
    properties: Mapping[str, Schema] = node_at(path, schema).get("properties", {})
    return properties


def printable(text: str) -> str:
    """The text as one line, with unprintable characters escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
