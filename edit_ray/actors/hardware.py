"""Whether a run would go on with the same bits here: by its hardware, configuration, model and ffmpeg."""

from __future__ import annotations

from collections.abc import Mapping

from edit_ray.errors import HardwareDiffers

Provenance = Mapping[str, str | int]
_SAID = {"config": "run.yaml was edited", "model": "the model's files are others than those it was begun with"}


def differing(before: Provenance, here: Provenance) -> list[str]:
    """The names of what is known of both and differs."""
    return [name for name in before if name in here and before[name] != here[name]]


def check_same(run_id: str, before: Provenance, here: Provenance) -> None:
    """Raises HardwareDiffers, naming what differs."""
    if names := differing(before, here):
        said = ", ".join(_SAID.get(name, f"{name} was {before[name]!r} and is {here[name]!r}") for name in names)
        raise HardwareDiffers(
            f"run {run_id!r} would not go on with the same bits here: {said}; --allow-different-hardware goes on anyway"
        )
