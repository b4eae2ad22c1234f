"""Mistakes in a configuration: where each one is, what to say about it, and what pydantic's errors say in our words.

What is valid is read from the models' JSON schema, so that each field's declaration is the only place that says it.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from edit_ray.options import Schema, describe, node_at

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """`text` is a whole sentence. `needs` are the other keys it was derived from: it says nothing if one is wrong."""

    path: KeyPath
    text: str
    needs: tuple[KeyPath, ...] = ()


class WrongKeys:
    """Keys that are known to be wrong, to tell what can still be said about the others."""

    def __init__(self, paths: Iterable[KeyPath] = ()) -> None:
        self.paths: set[KeyPath] = set()
        self._above: set[KeyPath] = set()
        for path in paths:
            self.add(path)

    def add(self, path: KeyPath) -> None:
        self.paths.add(path)
        self._above.update(_upwards(path))

    def touch(self, path: KeyPath) -> bool:
        """Whether the key, a part of it or one above it is wrong."""
        return path in self._above or any(above in self.paths for above in _upwards(path))

    def spoil(self, mistake: Mistake) -> bool:
        """Whether the mistake says nothing, because its key or one that it was derived from is wrong already."""
        return any(self.touch(path) for path in (mistake.path, *mistake.needs))


class Mistakes(ValueError):
    """Mistakes between the keys of a configuration whose every key is right by itself."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__(" ".join(mistake.text for mistake in self.mistakes))


def dotted(path: KeyPath) -> str:
    """The path as `--set` takes it: `prompt_segments.1.prompt`."""
    return ".".join(map(str, path))


def _upwards(path: KeyPath) -> Iterator[KeyPath]:
    return (path[:length] for length in range(len(path), -1, -1))


def mistakes_of(error: ValidationError, schema: Schema) -> list[Mistake]:
    """One mistake per wrong key. `schema` is the JSON schema of the model that was validated."""
    errors = error.errors(include_url=False)
    paths = [tuple(item["loc"]) for item in errors]
    found: list[Mistake] = []
    for item, path in zip(errors, paths, strict=True):
        context_error = item.get("ctx", {}).get("error")
        if isinstance(context_error, Mistakes):
            found += context_error.mistakes
        elif not _is_echo(path, item["type"], paths):
            found.append(Mistake(path, _sentence(item["type"], path, item["input"], context_error, schema)))
    return found


def show(value: object) -> str:
    """A given value in a few characters, as YAML would have it."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        text = repr(value[:61])
        return text if len(value) <= 60 else f"{repr(value[:40])[:-1]}…' ({len(value)} characters)"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} digits)"


def nearest_key(path: KeyPath, schema: Schema) -> str | None:
    """The known key, dotted, that the last part of `path` was most likely meant to be."""
    name = str(path[-1])
    siblings = list(_properties(path[:-1], schema))
    elsewhere = {leaf: place for place, leaf in _leaves(schema)}
    if name not in elsewhere:
        parts = [known for known in siblings if len(name) > 2 and (name in known or known in name)]
        if parts:
            return dotted((*path[:-1], parts[0]))
        for names, cutoff in ((siblings, 0.6), (list(elsewhere), 0.75), (siblings, 0.4)):
            close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
            if close and names is siblings:
                return dotted((*path[:-1], close[0]))
            if close:
                return elsewhere[close[0]]
    return elsewhere.get(name)


def _sentence(kind: str, path: KeyPath, given: object, cause: object, schema: Schema) -> str:
    if kind == "extra_forbidden":
        near = nearest_key(path, schema)
        hint = f"; did you mean {near}?" if near else "."
        return f"{dotted(path)} is an unknown key{hint} (Known here: {', '.join(_properties(path[:-1], schema))}.)"
    node = node_at(path, schema)
    valid = describe(node, schema)
    if kind == "missing":
        return f"{dotted(path)} is missing; it must be {valid}."
    if kind == "value_error" and node.get("type") == "object":
        return f"{dotted(path)} {cause}"
    return f"{dotted(path) or 'the configuration'} is {show(given)}; it must be {valid}."


def _is_echo(path: KeyPath, kind: str, paths: list[KeyPath]) -> bool:
    """A list whose entries are wrong is also called too short, because pydantic counts the right ones."""
    return kind == "too_short" and any(len(other) > len(path) and other[: len(path)] == path for other in paths)


def _properties(path: KeyPath, schema: Schema) -> Mapping[str, Schema]:
    properties: Mapping[str, Schema] = node_at(path, schema).get("properties", {})
    return properties


def _leaves(schema: Schema) -> Iterator[tuple[str, str]]:
    """Every key below a section, as (dotted path, name)."""
    for section in schema["properties"]:
        for name in _properties((section,), schema):
            yield f"{section}.{name}", name
