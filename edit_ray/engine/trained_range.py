"""What a model's card says that it was trained for, and what of a call lies beyond that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from edit_ray.engine.model_files import local_folder, locate_model, part_in
from edit_ray.errors import ModelError

CARD = "README.md"
SECTION = "trained_for"
"""The key of the card's front matter, with the fields of `TrainedFor`."""


@dataclass(frozen=True)
class TrainedFor:
    """`sizes` are pairs of height and width in pixels, the others the least and the most; None: nothing is said."""

    sizes: tuple[tuple[int, int], ...] | None = None
    num_frames: tuple[float, float] | None = None
    num_inference_steps: tuple[float, float] | None = None
    guidance_scale: tuple[float, float] | None = None

    def beyond(self, call: Mapping[str, Any]) -> str | None:
        """One sentence about what of a call's arguments, those that are given, lies beyond; None if nothing does."""
        said = []
        size = (call.get("height"), call.get("width"))
        if self.sizes is not None and None not in size and size not in self.sizes:
            known = " and ".join(f"{height}x{width}" for height, width in self.sizes)
            said.append(f"height and width are {size[0]}x{size[1]} and not {known}")
        for name in ("num_frames", "num_inference_steps", "guidance_scale"):
            within, given = getattr(self, name), call.get(name)
            if within is not None and given is not None and not within[0] <= given <= within[1]:
                span = f"{within[0]:g} to {within[1]:g}" if within[0] < within[1] else f"{within[0]:g}"
                said.append(f"{name} is {given:g} and not {span}")
        return f"beyond what this model was trained for: {', '.join(said)}" if said else None


def read_trained_for(card: Path | None) -> TrainedFor:
    """What the card says. One that is not there, cannot be read or has no such section says nothing."""
    try:
        section = (metadata_load(card) or {})[SECTION] if card is not None else {}
        sizes = section.get("sizes")
        return TrainedFor(
            sizes=None if sizes is None else tuple((int(height), int(width)) for height, width in sizes),
            **{
                name: (float(section[name][0]), float(section[name][1]))
                for name in ("num_frames", "num_inference_steps", "guidance_scale")
                if name in section
            },
        )
    except Exception:  # a card is prose of anybody's; what its readers raise depends on what is wrong
        return TrainedFor()


def beyond_training(path: str, call: Mapping[str, Any]) -> str | None:
    """One sentence about what of a call lies beyond the card of the model at `path`; of a hub id no card is read."""
    try:
        folder = local_folder(locate_model(path))
        return None if folder is None else read_trained_for(part_in(folder, CARD)).beyond(call)
    except ModelError:  # it is not on this machine
        return None
