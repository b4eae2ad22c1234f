"""A form's fields as the nested mapping that JSON would be: `video[id]=x` is {"video": {"id": "x"}}.

OpenAI's client sends forms whose nested values are named so. A list of mappings has no such name that says which entry
a value belongs to; it is sent as JSON, as all of `edit_ray` may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from edit_ray.config.mistakes import show
from edit_ray.config.strict_yaml import parse_scalar
from edit_ray.server.refusals import Problem

_NAME = re.compile(r"([^\[\]]{1,64})((?:\[[^\[\]]{0,64}\]){0,5})")
_JSON = ("edit_ray",)
_MOST_DEPTH = 16


def nested(fields: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[Problem]]:
    """The fields as a mapping, and what is wrong with their names. Values that are no text stay as they are.

    Text below `edit_ray` is read as `--set` reads it, except prompts.
    """
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in fields:
        try:
            _put(found, name, value)
        except ValueError as error:
            problems.append(Problem(f"{show(name)[:100]} {error}", name[:64], "invalid_request"))
    for name in _JSON:
        if isinstance(given := found.get(name), str):
            try:
                found[name] = from_json(given)
            except ValueError as error:
                del found[name]
                problems.append(Problem(f"{name} {error}", name, "invalid_request"))
    return found, problems


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError with a predicate: it is none, too deep, or names a key twice."""
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except _Twice as twice:
        raise ValueError(f"has the key {show(str(twice))} twice; it must have each key once.") from None
    except (ValueError, RecursionError) as error:
        said = f"at character {error.pos}" if isinstance(error, json.JSONDecodeError) else "or is too deep"
        raise ValueError(f"cannot be read as JSON ({said}); it must be a JSON object.") from None
    _check_depth(value)
    return value


class _Twice(ValueError):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > _MOST_DEPTH:
        raise ValueError(f"has more than {_MOST_DEPTH} levels; it must have fewer.")
    for below in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _check_depth(below, depth + 1)


def _put(found: dict[str, Any], name: str, value: Any) -> None:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError("is no name of a field; nested ones are named such as edit_ray[seed].")
    top, parts = match[1], re.findall(r"\[([^\[\]]*)\]", match[2])
    if "" in parts[:-1]:
        raise ValueError("is in a list of mappings, which a form cannot hold; send edit_ray as JSON text.")
    if parts and top in _JSON and isinstance(value, str) and not any("prompt" in part for part in parts):
        value = parse_scalar(value)
    *above, last = (top, *parts)
    for part in above[:-1] if last == "" else above:
        found = found.setdefault(part, {})
        if not isinstance(found, dict):
            raise ValueError("is given both as a value and as a mapping; it must be one of them.")
    key = above[-1] if last == "" else last
    if last == "":
        listed = found.setdefault(key, [])
        if not isinstance(listed, list):
            raise ValueError("is given both as a value and as a list; it must be one of them.")
        listed.append(value)
    elif key in found:
        raise ValueError("is given twice; it must be given once.")
    else:
        found[key] = value
