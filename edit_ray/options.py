"""The base class of every options section, and descriptions of valid values from its JSON schema.

Messages and documents take valid values from the schema, so each field's declaration is their only source.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

Schema = Mapping[str, Any]


class Options(BaseModel):
    """A frozen section of a configuration. Each layer has its own; `edit_ray.config` composes them.

    Unknown names and wrong types are errors, so that a typo never becomes a default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), strict=True)


def node_at(path: Sequence[str | int], schema: Schema) -> Schema:
    """The schema of the value at `path`; empty if there is none."""
    node = schema
    for part in path:
        others = node.get("additionalProperties")
        others = others if isinstance(others, Mapping) else {}
        below = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, others)
        node = _resolved(below, schema)
    return node


def describe(node: Schema, schema: Schema) -> str:
    """The valid values of a node, in words that follow "it must be"."""
    node = _resolved(node, schema)
    if "valid" in node:
        return str(node["valid"])
    if "anyOf" in node:
        return " or ".join(describe(choice, schema) for choice in node["anyOf"])
    if "const" in node or "enum" in node:
        choices = [node["const"]] if "const" in node else node["enum"]
        return f"{'one of ' if len(choices) > 1 else ''}{', '.join(map(str, choices))}"
    match node.get("type"):
        case "integer" | "number" as kind:
            return " ".join(("a whole number" if kind == "integer" else "a finite number", *_limits(node)))
        case "string":
            return " ".join(("text", *_count("characters", node.get("minLength"), node.get("maxLength"))))
        case "array":
            return " ".join(("a list", *_count("entries", node.get("minItems"), node.get("maxItems"))))
        case "object" if isinstance(each := node.get("additionalProperties"), Mapping):
            return f"{describe(each, schema)}, or a mapping of such"
        case "object":
            return f"a mapping with the keys {', '.join(node.get('properties', {}))}"
        case kind:
            return "true or false" if kind == "boolean" else str(kind)


def _resolved(node: Schema, schema: Schema) -> Schema:
    """The node behind a reference; for an optional key the choice that is not null."""
    if "$ref" in node:
        target: Schema = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        return target
    choices = [choice for choice in node.get("anyOf", ()) if choice.get("type") != "null"]
    if len(choices) != 1:
        return node
    return {**_resolved(choices[0], schema), **{key: value for key, value in node.items() if key != "anyOf"}}


def _limits(node: Schema) -> Iterator[str]:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        yield f"from {low:.15g} to {high:.15g}" if isinstance(high, float) else f"from {low} to {high}"
        return
    first = "from" if high is None and below is None else "at least"
    limits = [(first, low), ("above", above), ("at most", high), ("below", below)]
    if said := " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None):
        yield said


def _count(things: str, low: int | None, high: int | None) -> Iterator[str]:
    if high is not None:
        yield f"of {low or 0} to {high} {things}"
    elif low is not None:
        yield f"of at least {low} {things}"
