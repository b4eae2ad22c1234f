"""Files of LoRA: what they hold, and whether it fits a model; their headers are read, and no weights.

diffusers converts the dialects of keys (its own, the original Wan's, kohya's, lightx2v's), here without any values.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xxhash import xxh3_64

from edit_ray.engine.model_files import allowed_file, known_digest, locate_model, model_digest
from edit_ray.engine.model_info import ModelInfo
from edit_ray.engine.options import LoraOptions, ModelOptions
from edit_ray.errors import ModelError

Shape = Sequence[int]
Layers = Mapping[str, tuple[int, int]]  # features out and in, by the layer's name

PREFIX = "transformer."  # of every key, once diffusers has converted it
IMAGE_LAYERS = ("add_k_proj", "add_v_proj", "image_embedder")  # of Wan2.1: a LoRA for it suits Wan2.2 without them
_MATRIX = re.compile(r"transformer\.(?P<layer>.+)\.(?:(?P<down>lora_A|lora\.down)|lora_B|lora\.up)\.weight")


def lora_mistakes(model: ModelOptions, info: ModelInfo) -> Iterator[tuple[int, str, str]]:
    """For each LoRA that the model cannot take: its number, the wrong key, and what is wrong, after the key's name."""
    if model.loras and importlib.util.find_spec("peft") is None:
        yield 0, "path", "needs the library peft, of the extra edit_ray[lora], which is not installed."
        return
    layers: dict[str, Layers] = {}
    for index, lora in enumerate(model.loras):
        if lora.expert not in info.num_blocks:
            has = " and ".join(info.num_blocks)
            yield index, "expert", f"is {lora.expert!r}; it must be one that the model has: {has}."
            continue
        try:
            shapes = _shapes_of(lora)
            if lora.expert not in layers:
                layers[lora.expert] = _layers_in(model.path, lora.expert)
        except ModelError as error:
            yield index, "path", f"cannot be used: {error}"
            continue
        if (problem := _file_problem(shapes, layers[lora.expert])) is not None:
            yield index, "path", f"is {lora.path!r}, which {problem}"


def loras_digest(loras: Sequence[LoraOptions]) -> str:
    """xxh3_64 of the files, with weights and experts, in 16 hexadecimal digits; empty for none. Raises ModelError."""
    digest = xxh3_64()
    for lora in loras:
        try:
            digest.update(f"{known_digest(allowed_file(lora.path))} {lora.weight!r} {lora.expert}\n".encode())
        except OSError as error:
            raise ModelError(f"{lora.path!r} cannot be read: {error}.") from None
    return digest.hexdigest() if loras else ""


def weights_digest(model: ModelOptions) -> tuple[str | None, str]:
    """The digests of all files that a model is loaded from, and of its LoRAs. Raises ModelError."""
    return model_digest(model.path, model.files.values()), loras_digest(model.loras)


def layers_of(transformer: Any) -> Layers:
    """The linear layers of a transformer, those under a LoRA by the names that they had before it."""
    from torch import nn

    named = ((name.removesuffix(".base_layer"), each) for name, each in transformer.named_modules())
    return {name: (each.out_features, each.in_features) for name, each in named if isinstance(each, nn.Linear)}


def fit_problem(shapes: Mapping[str, Shape], layers: Layers, held: Sequence[str] = ()) -> str | None:
    """Why a LoRA does not fit a transformer, as the end of a sentence; None if it fits.

    Args:
        shapes: Of its tensors, by the keys that diffusers has converted.
        layers: The transformer's linear layers.
        held: The keys before that.
    """
    if any(".lokr_" in key for key in shapes):  # products of another kind, which diffusers checks
        return None
    pairs: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if match := _MATRIX.fullmatch(key):
            pairs.setdefault(match["layer"], {})["down" if match["down"] else "up"] = shape
    if not pairs.keys() & layers.keys():
        return f"matches nothing in the transformer; it holds {_listed(held or list(shapes))}."
    absent = [name for name in pairs.keys() - layers.keys() if not any(part in name for part in IMAGE_LAYERS)]
    if absent:
        return f"is of another model: this transformer has no {_listed(sorted(absent))}."
    for name in sorted(pairs.keys() & layers.keys()):
        down, up = pairs[name].get("down"), pairs[name].get("up")
        if down is None or up is None or len(down) != 2 or len(up) != 2:
            return f"has no two matrices for {name}."
        if down[0] != up[1]:
            return f"has the ranks {down[0]} and {up[1]} in the two matrices of {name}; they must be equal."
        (out, features), (expected_out, expected) = (up[0], down[1]), layers[name]
        if (out, features) != (expected_out, expected):
            return (
                f"is of another model: its {name} has {features} features in and {out} out, that of this transformer "
                f"{expected} and {expected_out}."
            )
    return None


def _file_problem(shapes: Mapping[str, Shape], layers: Layers) -> str | None:
    """Why the tensors of a file, as they are named there, do not fit the `layers`; None if they do."""
    import torch
    from diffusers import WanPipeline

    # A scale is a number that the conversion reads; which one changes no shape.
    tensors = {
        key: torch.ones(()) if key.endswith(".alpha") else torch.empty(tuple(shape), device="meta")
        for key, shape in shapes.items()
    }
    try:
        converted = WanPipeline.lora_state_dict(tensors)
    except Exception as error:  # what the conversion does not expect raises anything
        return f"has no keys that diffusers converts ({type(error).__name__}); it holds {_listed(list(shapes))}."
    return fit_problem({key: tuple(tensor.shape) for key, tensor in converted.items()}, layers, list(shapes))


def _shapes_of(lora: LoraOptions) -> dict[str, Shape]:
    """The shapes in a file's header. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(allowed_file(lora.path), framework="np") as held:
            return {key: held.get_slice(key).get_shape() for key in held.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{lora.path!r} cannot be read as safetensors: {error}.") from None


def _layers_in(path: str, expert: str) -> Layers:
    """The linear layers of a model's expert, made from its JSON file. Raises ModelError."""
    import diffusers
    import torch

    try:
        config = diffusers.WanTransformer3DModel.load_config(locate_model(path), subfolder=expert)
        with torch.device("meta"):
            return layers_of(getattr(diffusers, config["_class_name"]).from_config(config))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path!r} has a {expert}/config.json that is damaged: {error}") from None


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "no tensor") + rest
