"""Transformers from single files and in fewer bits, through diffusers' own loaders.

In fewer bits are the blocks; what is around them is small, and stays in `torch_dtype`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import GGUFQuantizationConfig, TorchAoConfig
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edit_ray.engine.model_files import INDEX_FILE, allowed_file, hub_file, local_folder
from edit_ray.engine.options import ModelOptions
from edit_ray.errors import ModelError

AROUND_BLOCKS = ["patch_embedding", "vace_patch_embedding", "condition_embedder", "proj_out"]
SCALES = (
    ".scale_weight",
    ".weight_scale",
)  # factors of a weight in 8 bits, as ComfyUI's and LightX2V's files name them
PREFIX = "model.diffusion_model."
OTHERS = ("scaled_fp8", ".scale_input", ".input_scale")  # of activations, and marks

logging.getLogger("diffusers.quantizers.gguf").setLevel(logging.ERROR)  # it warns of each layer that stays as it is


def load_transformers(model: ModelOptions, location: str, dtype: torch.dtype) -> dict[str, Any]:
    """The transformers that the model's own files are not loaded as, by name, in host memory.

    Args:
        location: The model's folder or hub id, as `locate_model` gives it.

    Raises:
        ModelError: a package is missing, a file cannot be read, or is not a transformer of this model.
    """
    for name, problem in model.problems_here().items():
        raise ModelError(f"model.{name} {problem}")
    return {name: _from_file(name, file, location, dtype) for name, file in model.files.items()}


def storing(model: ModelOptions, names: list[str]) -> dict[str, Any]:
    """What `from_pretrained` is told, for the transformers `names` to be stored in 8 bits by torchao."""
    if model.storage != "int8" or not names:
        return {}
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=AROUND_BLOCKS)
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config))}


def _from_file(name: str, file: str, location: str, dtype: torch.dtype) -> Any:
    path = allowed_file(file)
    try:
        cls = getattr(diffusers, _class_name(name, location))
        if path.suffix.lower() == ".gguf":
            config = GGUFQuantizationConfig(compute_dtype=dtype)
            config.modules_to_not_convert = list(AROUND_BLOCKS)
            where = {"config": location, "subfolder": name}
            return cls.from_single_file(str(path), **where, torch_dtype=dtype, quantization_config=config)
        with init_empty_weights(include_buffers=False):
            transformer = cls.from_config(cls.load_config(location, subfolder=name)).eval()
        wide = cls._keep_in_fp32_modules
        weights = {
            # Copied: a mapped file has tensors at any address, where a CPU's kernels give other last bits.
            key: tensor.to(torch.float32 if any(part in wide for part in key.split(".")) else dtype, copy=True)
            for key, tensor in unscaled(load_file(path)).items()
        }
        if lacking := sorted(transformer.state_dict().keys() - weights.keys()):
            raise ValueError(f"it has no {lacking[0]}, nor {len(lacking) - 1} others")
        transformer.load_state_dict(weights, strict=False, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"model.{name} {file!r} cannot be loaded as a transformer of the model: {said}.") from error
    return transformer


def unscaled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in diffusers' names; those in 8 bits multiplied with their scales, one number or one for each row."""
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if not name.endswith(OTHERS)}
    scales = {}
    for name in list(weights):
        for suffix in SCALES:
            if name.endswith(suffix):
                scales[f"{name.removesuffix(suffix)}.weight"] = weights.pop(name).float()
    for name, scale in scales.items():
        weights[name] = weights[name].float() * scale.reshape(-1, 1)
    return convert_wan_transformer_to_diffusers(weights) if any(".self_attn." in name for name in weights) else weights


def _class_name(name: str, location: str) -> str:
    folder = local_folder(location)
    index = Path(folder, INDEX_FILE) if folder is not None else hub_file(location, INDEX_FILE)
    entry = json.loads(index.read_text()).get(name) if index is not None else None
    if not isinstance(entry, list) or entry[1] is None:
        raise ValueError(f"the model has no {name}")
    return str(entry[1])
