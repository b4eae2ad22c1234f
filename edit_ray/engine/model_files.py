"""Resolves a model's path (`builtin:`, folder or hub id), digests its files, gets small ones from the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from xxhash import xxh3_64

from edit_ray.errors import ModelError
from edit_ray.files import digest_of_file

BUILTIN_PREFIX = "builtin:"
BUILTINS = ("tiny_wan",)
INDEX_FILE = "model_index.json"
ROOTS_VARIABLE = "EDIT_RAY_MODEL_ROOTS"
"""Folders as in PATH. If a cluster's operator sets it, models are loaded only from there and from the package."""
HUB_TIMEOUT_S = 5.0

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_digests: dict[tuple[str, int, int, int], int] = {}  # of files, by path, size, time of the last change and inode


def locate_model(path: str) -> str:
    """What `from_pretrained` takes: a folder in diffusers' layout, or a hub id, unchanged and not looked up.

    Args:
        path: `builtin:tiny_wan`, a folder, or a hub id such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.

    Raises:
        ModelError: none of them, a folder without `model_index.json`, or (a hub id too) not in `$EDIT_RAY_MODEL_ROOTS`.
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
    if _HUB_ID.fullmatch(path) is not None and ".." not in path and "--" not in path:
        _check_allowed(None, path)
        return path
    raise ModelError(f"{path!r} is neither a folder nor a hub id like org/name.")


def local_folder(path: str) -> Path | None:
    """The folder that the path names, `~` expanded; None if there is none."""
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def roots_in(variable: str) -> list[Path]:
    """The folders that an environment variable names, as PATH does."""
    return [Path(root) for root in os.environ.get(variable, "").split(os.pathsep) if root]


def _check_allowed(folder: Path | None, path: str) -> None:
    roots = roots_in(ROOTS_VARIABLE)
    inside = folder is not None and any(folder.is_relative_to(root.resolve()) for root in (_ASSETS, *roots))
    if roots and not inside:
        said = os.pathsep.join(map(str, roots))
        raise ModelError(f"{path!r} is not allowed here; models are {BUILTIN_PREFIX}… or folders in {said}.")


def allowed_file(path: str) -> Path:
    """A single file, such as a LoRA. Raises ModelError: there is none, or it is outside `$EDIT_RAY_MODEL_ROOTS`."""
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"{path!r} is not a file.")
    _check_allowed(file.resolve(), path)
    return file


def _checked_folder(folder: Path, path: str) -> str:
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(f"{path!r} is the folder {folder}, which has no {INDEX_FILE}; a diffusers model has one.")
    return str(folder)


def folder_above(folder: Path) -> Path | None:
    """The model in whose folder a causal model's lies, and whose parts it takes where it has none; None without one.

    Raises ModelError if it is outside `$EDIT_RAY_MODEL_ROOTS`.
    """
    above = folder.resolve().parent
    try:
        causal = "causal" in json.loads((folder / INDEX_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if not causal or not (above / INDEX_FILE).is_file():
        return None
    _check_allowed(above, str(above))
    return above


def part_in(folder: Path, name: str) -> Path:
    """A part or a file of the model in a folder, or of the one above that it takes parts of; it need not exist."""
    above = None if (folder / name).exists() else folder_above(folder)
    return folder / name if above is None else above / name


def model_digest(path: str, files: Iterable[str] = ()) -> str | None:
    """xxh3_64 of all files that a model is loaded from, as 16 hexadecimal digits; None for a hub id alone.

    `files` are those of transformers that replace the model's own.

    A file is read once in this process, and again when its size, time of change or inode differ. Raises ModelError.
    """
    folder, singles = local_folder(locate_model(path)), [allowed_file(file) for file in files]
    if folder is None and not singles:
        return None
    digest = xxh3_64()
    try:
        if folder is not None:
            digest.update(f"{INDEX_FILE} {known_digest(folder / INDEX_FILE)}\n".encode())
            for name in sorted(json.loads((folder / INDEX_FILE).read_bytes())):
                part = part_in(folder, name)
                for file in [file for file in sorted(part.rglob("*")) if file.is_file()]:
                    digest.update(f"{file.relative_to(part.parent)} {known_digest(file)}\n".encode())
        for file in singles:
            digest.update(f"{known_digest(file)}\n".encode())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path!r} ({folder}) cannot be read: {error}") from None
    return digest.hexdigest()


def known_digest(file: Path) -> int:
    """xxh3_64 of a file, cached; it is read again when its size, time of change or inode differ. Raises OSError."""
    there = os.stat(file)
    key = str(file), there.st_size, there.st_mtime_ns, there.st_ino
    if key not in _digests:
        _digests[key] = digest_of_file(file)
    return _digests[key]


class HubUnreachable(Exception):
    """The hub does not give the file; the message says why in a few words."""


def hub_file(hub_id: str, name: str) -> Path | None:
    """A small file of the model, from the cache (`HF_HOME`) or the hub; None if the model has no such file.

    Raises:
        HubUnreachable: no answer within seconds, no such model, no access, or offline and not in the cache.
    """
    try:
        cached = try_to_load_from_cache(hub_id, name)
        if cached is not None:
            return Path(cached) if isinstance(cached, str) else None
        # Asked first, because without a network the download itself retries for half a minute.
        get_hf_file_metadata(hf_hub_url(hub_id, name), timeout=HUB_TIMEOUT_S)
        return Path(hf_hub_download(hub_id, name, etag_timeout=HUB_TIMEOUT_S))
    except OfflineModeIsEnabled:
        said = "offline mode is on, and it is not in the cache"
    except GatedRepoError:
        said = "the hub grants access to it only on request"
    except RepositoryNotFoundError:
        said = "the hub knows no such model, or it is private"
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        said = f"the hub answered {error.response.status_code}"
    except Exception as error:  # the HTTP library under the hub's client has errors of its own
        said = f"the hub cannot be reached: {type(error).__name__}"
    raise HubUnreachable(said)
