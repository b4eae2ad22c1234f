"""The door's OpenAPI schema: requests as the configuration has it, answers as their classes have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import edit_ray
from edit_ray.config import Config
from edit_ray.options import Schema, node_at
from edit_ray.server.refusals import CODES
from edit_ray.server.video_request import CONTINUITY, ENTRY, OURS, SAMPLING

TITLE = "EDiT on Ray"
DESCRIPTION = (
    "OpenAI's video API over durable runs. Every answer comes from the runs' folders, so that any replica gives it, "
    f"and a restart loses nothing. All that OpenAI's API has no name for is under `{OURS}`."
)


def create_schema() -> dict[str, Any]:
    """The body of a request for a video."""
    schema = Config.model_json_schema()
    storyboard = {"type": "array", "items": _object({name: _of(schema, "prompt_segments", 0, name) for name in ENTRY})}
    ours = {
        "storyboard": storyboard | {"description": "Prompts in order, in place of `prompt`."},
        "num_segments": _of(schema, "video", "num_segments"),
        "approve": _of(schema, "video", "approve"),
        "continuity": _object({name: _of(schema, "continuity", name) for name in CONTINUITY}),
        "cache": _of(schema, "cache") | {"additionalProperties": True},
        **{name: _of(schema, "sampling", name) for name in SAMPLING},
    }
    of_file = {"type": "string", "format": "binary", "description": "A picture or a clip that the video begins with."}
    of_url = _object({"image_url": {"type": "string", "description": "A data URL in base64."}})
    return _object(
        {
            "prompt": _of(schema, "prompt_segments", 0, "prompt"),
            "model": {"type": "string", "description": "One of `/v1/models`; the first of them by default."},
            "seconds": {"type": "string", "description": "Rounded up to whole segments.", "example": "4"},
            "size": {"type": "string", "description": "Width x height, in pixels.", "example": "128x128"},
            "input_reference": {"anyOf": [of_file, of_url]},
            OURS: _object(ours) | {"description": "In a form, JSON text or fields such as `edit_ray[seed]`."},
        }
    )


NUMBER, TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}


def change_schema(required: Sequence[str], entry: Sequence[str], **more: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request that changes a video: fields of a prompt's entry by their names, and `more`."""
    schema = Config.model_json_schema()
    known = {name: _of(schema, "prompt_segments", 0, name) for name in entry}
    return _object({**known, **{name: dict(field) for name, field in more.items()}}) | {"required": list(required)}


def body(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A request's body of this schema, in each form that is taken."""
    kinds = ("application/json", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {kind: {"schema": dict(schema)} for kind in kinds}}}


def query(**parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a URL's query."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": dict(schema)}
            for name, schema in parameters.items()
        ]
    }


def refusal_schema() -> dict[str, Any]:
    """The body of every refusal."""
    code = {"type": "string", "enum": sorted(CODES)}
    text, param = {"type": "string"}, {"type": ["string", "null"]}
    problems = {"type": "array", "items": _object({"param": param, "code": code, "message": text})}
    error = {"message": text, "type": text, "param": param, "code": code, OURS: _object({"problems": problems})}
    return _object({"error": _object(error)})


def completed(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's schema with what it cannot know: the refusals, and the token."""
    schema["components"].setdefault("schemas", {})["Refusal"] = refusal_schema()
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}, {}]
    refused = {
        "description": "Refused.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}},
    }
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = refused
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    return schema


VERSION = edit_ray.__version__


def _of(schema: Schema, *path: str | int) -> dict[str, Any]:
    """The schema of a key of the configuration, without references."""
    found = {name: value for name, value in node_at(path, schema).items() if name not in ("title", "default", "anyOf")}
    if "valid" in found:
        found["description"] = f"{str(found.pop('valid')).capitalize()}."
    whole: dict[str, Any] = _whole(found, schema)
    return whole


def _whole(node: Any, schema: Schema) -> Any:
    if isinstance(node, Mapping):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        kept = {name: value for name, value in node.items() if name != "valid"}
        return {name: _whole(value, schema) for name, value in kept.items()}
    return [_whole(value, schema) for value in node] if isinstance(node, list) else node


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}
