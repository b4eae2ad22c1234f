"""Reads a pickled checkpoint in a process of its own: `python -m edit_ray.engine.checkpoint_process SOURCE TARGET`.

A pickle may run code. torch reads it with `weights_only=True`, which allows tensors and plain values alone; whatever is
wrong with the file ends this process and no other. The weights are written as safetensors.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HOLDERS = ("generator_ema", "generator", "state_dict", "model")
"""Where published checkpoints have the weights; the average over the training comes first."""


def weights_in(checkpoint: object) -> dict[str, Tensor]:
    """The weights of a checkpoint by name. Raises ValueError if it has none."""
    found: Any = checkpoint
    while isinstance(found, Mapping) and (holder := next((name for name in HOLDERS if name in found), None)):
        found = found[holder]
    if not isinstance(found, Mapping) or not found or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f"it has no mapping of weights, by itself or under {', '.join(HOLDERS)}")
    return {str(name): each.detach().clone() for name, each in found.items()}


def main(source: str, target: str) -> None:
    """Write the weights in the pickle `source` to `target`, or end with a sentence that says why not."""
    try:
        save_file(weights_in(torch.load(source, map_location="cpu", weights_only=True, mmap=True)), Path(target))
    except Exception as error:  # a damaged or hostile file may raise anything
        sys.exit(str(error).partition("\n")[0] or type(error).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
