"""The host tier: tensors in this process's memory, within a byte budget, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch

from edit_ray.cache.stores.store import Key, check_budget

_LARGE = 1 << 20  # bytes


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
        self._entries[key] = _copy(tensor.detach())
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


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU; a large one in pages of its own, which go back to the system with it.

    In the C library's heap, whose holes an aligned block of the very size does not fit into, a store that lets large
    tensors come and go takes more than twice its budget.
    """
    if tensor.nbytes < _LARGE:
        return tensor.to("cpu", copy=True).contiguous()
    memory = mmap(-1, tensor.nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


CPUOffloadStore = HostStore  # what the library's users know it as
