"""Published causal checkpoints as folders in diffusers' layout, with the options that `EditCausalWanPipeline` reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from edit_ray.engine.causal_options import INDEX_KEY, CausalOptions
from edit_ray.engine.model_files import INDEX_FILE, local_folder, locate_model
from edit_ray.errors import ModelError

PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of names that training leaves in them."""


def convert(source: Path, base: str, output: Path, options: CausalOptions) -> Path:
    """Write a causal checkpoint as a diffusers folder; returns `output`.

    Args:
        source: A pickle or a safetensors file with the original names (Self-Forcing, LongLive), or a folder in
            diffusers' layout (FastVideo), the model's or its transformer's.
        base: The bidirectional model that it was made of, with its sizes, VAE, text encoder and tokenizer: a folder,
            `builtin:…` or a hub id.
        output: A new folder.

    Raises:
        ModelError: the source cannot be read, or is not of the sizes of the base.
        OSError: the folder cannot be written.
    """
    folder = _folder_of(base)
    index = json.loads((folder / INDEX_FILE).read_text())
    config = json.loads((folder / "transformer" / "config.json").read_text())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        made = Path(scratch) / "model"
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(config)
        weights = diffusers_names(_read(source, Path(scratch)))
        _check(model, weights, source, base)
        model.load_state_dict(weights, assign=True)
        model.save_pretrained(made / "transformer")
        for part in PARTS:
            if (folder / part).is_dir():
                shutil.copytree(folder / part, made / part, copy_function=_link)
        index |= {"_class_name": "EditCausalWanPipeline", "_diffusers_version": diffusers.__version__}
        index |= {"transformer": ["diffusers", "WanTransformer3DModel"], INDEX_KEY: options.model_dump()}
        (made / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        made.rename(output)
    return output


def diffusers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under diffusers' names, from those or from the original ones, with or without what training adds."""
    plain = {}
    for name, weight in weights.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        plain[name.removeprefix("model.")] = weight
    if any(name.startswith("condition_embedder.") for name in plain):
        return plain
    renamed: dict[str, Tensor] = convert_wan_transformer_to_diffusers(plain)
    return renamed


def _read(source: Path, scratch: Path) -> dict[str, Tensor]:
    """The weights in a file or a folder of safetensors; a pickle is read in a process of its own."""
    if source.is_dir():
        folder = source / "transformer" if (source / "transformer").is_dir() else source
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{str(source)!r} has no safetensors files, in itself or in its folder transformer.")
    elif source.suffix == ".safetensors":
        files = [source]
    else:
        files = [scratch / "weights.safetensors"]
        command = [sys.executable, "-m", "edit_ray.engine.checkpoint_process", str(source), str(files[0])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2] or f"its reader ended with {done.returncode}"
            raise ModelError(f"{str(source)!r} cannot be read as a checkpoint: {said}.")
    try:
        return {name: weight for file in files for name, weight in load_file(file).items()}
    except Exception as error:  # the safetensors library raises its own, and OSError
        raise ModelError(f"{str(source)!r} cannot be read: {error}.") from None


def _check(model: Any, weights: dict[str, Tensor], source: Path, base: str) -> None:
    """Raise ModelError unless the weights are those of the model, each in its shape."""
    expected = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    given = {name: tuple(each.shape) for name, each in weights.items()}
    for what, names in (("lacks", expected.keys() - given.keys()), ("has beyond them", given.keys() - expected.keys())):
        if names:
            raise ModelError(
                f"{str(source)!r} is not a checkpoint of {base!r}'s sizes: of {len(expected)} weights it {what} "
                f"{len(names)}, such as {min(names)}."
            )
    for name, shape in expected.items():
        if given[name] != shape:
            raise ModelError(
                f"{str(source)!r} is not a checkpoint of {base!r}'s sizes: {name} is {list(given[name])} there, and "
                f"{list(shape)} in the base."
            )


def _folder_of(base: str) -> Path:
    """The folder of the base; from the hub what is needed of it is downloaded."""
    found = local_folder(locate_model(base))
    if found is not None:
        return found
    wanted = [INDEX_FILE, "transformer/config.json", *(f"{part}/*" for part in PARTS)]
    try:
        return Path(snapshot_download(base, allow_patterns=wanted))
    except Exception as error:  # the HTTP library under the hub's client has errors of its own
        raise ModelError(f"{base!r} is neither a folder nor a hub id that can be reached: {error}.") from None


def _link(source: str, target: str) -> None:
    """A second name of the same file, or a copy where the file system has no such thing."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
