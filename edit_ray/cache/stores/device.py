"""The device tier: tensors where they are, by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from edit_ray.cache.stores.store import Key


class GPUStore:
    """A `CacheStore` that keeps the tensors it is given, on their own device, without a bound; they belong to it then.

    Not thread-safe: one owner at a time.
    """

    tier = "device"

    def __init__(self) -> None:
        self.bytes_resident = 0
        self._entries: dict[Key, torch.Tensor] = {}

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        self.drop(key)
        self._entries[key] = tensor.detach()
        self.bytes_resident += tensor.nbytes

    def get(self, key: Key) -> torch.Tensor | None:
        return self._entries.get(key)

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Nothing to do: every entry is already where it is used."""

    def drop(self, key: Key) -> None:
        tensor = self._entries.pop(key, None)
        if tensor is not None:
            self.bytes_resident -= tensor.nbytes

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        for key in [key for key in self._entries if condition(key)]:
            self.drop(key)

    def clear(self) -> None:
        self._entries.clear()
        self.bytes_resident = 0

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, oldest first."""
        return {key: tensor.nbytes for key, tensor in self._entries.items()}

    def __len__(self) -> int:
        return len(self._entries)
