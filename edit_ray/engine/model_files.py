"""What a model's path means: a model that came with the package, a folder, or an id on the hub."""

import os
import re
from pathlib import Path

from edit_ray.errors import ModelError

BUILTIN_PREFIX = "builtin:"
BUILTINS = ("tiny_wan",)
INDEX_FILE = "model_index.json"
ROOTS_VARIABLE = "EDIT_RAY_MODEL_ROOTS"
"""Folders as in PATH. Where it is set, as by who runs a cluster, models are loaded from there and the package alone."""

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def locate_model(path: str) -> str:
    """What `from_pretrained` takes: a folder of diffusers' layout, or a hub id, unchanged and not looked up.

    Args:
        path: `builtin:tiny_wan`, a folder, or a hub id such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.

    Raises:
        ModelError: none of them, a folder without `model_index.json`, or outside of `$EDIT_RAY_MODEL_ROOTS`.
    """
    if path.startswith(BUILTIN_PREFIX):
        name = path.removeprefix(BUILTIN_PREFIX)
        if name not in BUILTINS:
            known = ", ".join(BUILTIN_PREFIX + known for known in BUILTINS)
            raise ModelError(f"{path!r} did not come with edit_ray; known are: {known}.")
        return _checked_folder(_ASSETS / name, path)
    folder = local_folder(path)
    if folder is not None:
        _check_allowed(folder.resolve(), path)
        return _checked_folder(folder, path)
    if is_hub_id(path):
        _check_allowed(None, path)
        return path
    raise ModelError(f"{path!r} is neither a folder nor a hub id like org/name.")


def local_folder(path: str) -> Path | None:
    """The folder that the path names, `~` expanded; None where there is none."""
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def is_hub_id(path: str) -> bool:
    """Whether the path has a hub id's form, `org/name`."""
    return _HUB_ID.fullmatch(path) is not None and ".." not in path and "--" not in path


def _check_allowed(folder: Path | None, path: str) -> None:
    roots = [Path(root) for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root]
    inside = folder is not None and any(folder.is_relative_to(root.resolve()) for root in (_ASSETS, *roots))
    if roots and not inside:
        said = os.pathsep.join(map(str, roots))
        raise ModelError(f"{path!r} is not allowed here; models are {BUILTIN_PREFIX}… or folders in {said}.")


def _checked_folder(folder: Path, path: str) -> str:
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(f"{path!r} is the folder {folder}, which has no {INDEX_FILE}; a diffusers model has one.")
    return str(folder)
