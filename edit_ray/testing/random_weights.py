"""Random weights for a model's real sizes, written file by file, so that no machine needs to hold them all."""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE_BYTES = 2 * 2**30


def save_random_weights(
    model: nn.Module,
    stem: Path,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write weights for `model`, which may be on the device "meta", as `stem`.safetensors, or as several with an index.

    Each tensor depends on its name, `seed` and the type of `device`, on which it is drawn, alone.
    """
    names = _files(model, dtype.itemsize, file_bytes)
    if len(names) == 1:
        save_file(_drawn(model, names[0], seed, dtype, device), stem.with_name(f"{stem.name}.safetensors"), _FORMAT)
        return
    files = {f"{stem.name}-{index:05}-of-{len(names):05}.safetensors": of for index, of in enumerate(names, 1)}
    for file, of in files.items():
        save_file(_drawn(model, of, seed, dtype, device), stem.with_name(file), _FORMAT)
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    weight_map = {name: file for file, of in files.items() for name in of}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


_FORMAT = {"format": "pt"}


def fill_random(model: nn.Module, seed: int = 0) -> None:
    """Give the parameters of `model` the values that `save_random_weights` writes for its device, in its types."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, seed, parameter.device))


def _files(model: nn.Module, itemsize: int, file_bytes: int) -> list[list[str]]:
    """The names of the parameters of each file, in order."""
    files: list[list[str]] = [[]]
    room = file_bytes
    for name, parameter in model.named_parameters():
        size = parameter.numel() * itemsize
        if files[-1] and size > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    return files


def _drawn(
    model: nn.Module, names: list[str], seed: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return dict(_tensors(shapes, names, seed, dtype, device))


def _tensors(
    shapes: dict[str, torch.Size], names: list[str], seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, _draw(name, shapes[name], seed, device).to(dtype).cpu()


def _draw(name: str, shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Float32 values that keep activations of order one: matrices by their inputs, norms one, biases small."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "gamma" or (kind == "weight" and len(shape) == 1):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    scale = 0.02 if kind == "bias" else math.prod(shape[1:]) ** -0.5
    if kind == "scale_shift_table":
        scale = shape[-1] ** -0.5
    return torch.randn(shape, generator=generator, device=device).mul_(scale)
