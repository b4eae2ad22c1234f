"""What a model's path means: a model that came with the package, a folder, or an id on the hub."""

import re
from pathlib import Path

from edit_ray.errors import ModelError

BUILTIN_PREFIX = "builtin:"
BUILTINS = ("tiny_wan",)
INDEX_FILE = "model_index.json"

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def locate_model(path: str) -> str:
    """What `from_pretrained` takes: a folder of diffusers' layout, or a hub id, unchanged and not looked up.

    Args:
        path: `builtin:tiny_wan`, a folder, or a hub id such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.

    Raises:
        ModelError: none of them, or a folder without `model_index.json`.
    """
    if path.startswith(BUILTIN_PREFIX):
        name = path.removeprefix(BUILTIN_PREFIX)
        if name not in BUILTINS:
            known = ", ".join(BUILTIN_PREFIX + known for known in BUILTINS)
            raise ModelError(f"{path!r} did not come with edit_ray; known are: {known}.")
        return _checked_folder(_ASSETS / name, path)
    folder = local_folder(path)
    if folder is not None:
        return _checked_folder(folder, path)
    if is_hub_id(path):
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


def _checked_folder(folder: Path, path: str) -> str:
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(f"{path!r} is the folder {folder}, which has no {INDEX_FILE}; a diffusers model has one.")
    return str(folder)
