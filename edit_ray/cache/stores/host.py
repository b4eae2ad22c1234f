"""The host tier: tensors in this process's memory, within a byte budget, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from edit_ray.cache.stores.store import Key, check_budget


class HostStore:
    """A `CacheStore` in RAM. `budget_bytes` None means no bound.

    Counts what it refuses (larger than the whole budget) and what it evicts. Not thread-safe: one owner at a time.
    """

    tier = "host"

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = check_budget(budget_bytes)
        self.bytes_resident = 0
        self.num_evictions = 0
        self.num_refused = 0
        self._entries: OrderedDict[Key, torch.Tensor] = OrderedDict()

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        self.drop(key)
        size = tensor.nbytes
        if self.budget_bytes is not None and size > self.budget_bytes:
            self.num_refused += 1
            return
        while self.budget_bytes is not None and self.bytes_resident + size > self.budget_bytes:
            self.drop(next(iter(self._entries)))
            self.num_evictions += 1
        self._entries[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self.bytes_resident += size

    def get(self, key: Key) -> torch.Tensor | None:
        tensor = self._entries.get(key)
        if tensor is not None:
            self._entries.move_to_end(key)
        return tensor

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Nothing to do: every entry is already where `get` finds it."""

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
        """Bytes of every entry, least recently used first."""
        return {key: tensor.nbytes for key, tensor in self._entries.items()}

    def __len__(self) -> int:
        return len(self._entries)


CPUOffloadStore = HostStore  # what the library's users know it as
