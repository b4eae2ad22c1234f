"""The disk tier: one safetensors file for each entry, which the next process that opens the directory finds again."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from xxhash import xxh3_128_hexdigest

from edit_ray.cache.stores.store import Key

_OURS = re.compile(r"[0-9a-f]{32}\.(safetensors|unfinished)")
_TENSOR = "tensor"


class DiskOffloadStore:
    """A `CacheStore` in files, without a bound. A directory belongs to one store at a time; others' files in it stay.

    A file is named after the hash of its key, holds the key as JSON in its metadata, and appears whole, by a rename.
    What has such a name and cannot be read is removed and counted in `num_unreadable`. Not thread-safe.
    """

    tier = "disk"

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"directory is {str(directory)!r}, which is a file; valid is a folder, or a name for one.")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.bytes_resident = 0
        self.num_unreadable = 0
        self._sizes: dict[Key, int] = {}
        self._scan()

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises OSError or SafetensorError if it cannot be written; nothing is left under the key then."""
        self.drop(key)
        path, text = self._path(key), _text(key)
        unfinished = path.with_suffix(".unfinished")
        try:
            save_file({_TENSOR: tensor.detach().cpu().contiguous()}, unfinished, {"key": text})
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._add(key, tensor.nbytes)

    def get(self, key: Key) -> torch.Tensor | None:
        if key not in self._sizes:
            return None
        found = _read(self._path(key))
        if found is None:
            self.num_unreadable += 1
            self.drop(key)
            return None
        return found[1].clone()  # of the mapped file: what happens to that is nothing to the tensor

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Nothing to do: there is no faster place for it here."""

    def drop(self, key: Key) -> None:
        size = self._sizes.pop(key, None)
        if size is not None:
            self.bytes_resident -= size
            self._path(key).unlink(missing_ok=True)

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        for key in [key for key in self._sizes if condition(key)]:
            self.drop(key)

    def clear(self) -> None:
        self.drop_where(lambda key: True)

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, oldest first."""
        return dict(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def _scan(self) -> None:
        ours = [path for path in self.directory.iterdir() if _OURS.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: path.stat().st_mtime_ns):
            found = _read(path)
            if found is not None:
                self._add(found[0], found[1].nbytes)
                continue
            self.num_unreadable += path.suffix != ".unfinished"  # that one is no loss: its writer was stopped
            path.unlink()

    def _add(self, key: Key, size: int) -> None:
        self._sizes[key] = size
        self.bytes_resident += size

    def _path(self, key: Key) -> Path:
        return self.directory / f"{_hash(_text(key))}.safetensors"


def _text(key: Key) -> str:
    """The same for keys that are equal, such as (1,) and (True,)."""
    return json.dumps([part if part is None or isinstance(part, str) else operator.index(part) for part in key])


def _hash(text: str) -> str:
    return xxh3_128_hexdigest(text.encode())


def _read(path: Path) -> tuple[Key, torch.Tensor] | None:
    """Key and tensor of a file that `put` wrote whole, else None; its bytes are mapped and not read yet."""
    try:
        with safe_open(path, framework="pt") as file:
            text, tensor = (file.metadata() or {})["key"], file.get_tensor(_TENSOR)
        return (tuple(json.loads(text)), tensor) if path.name == f"{_hash(text)}.safetensors" else None
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None
