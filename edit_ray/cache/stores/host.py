"""The host tier: tensors in this process's memory, within a byte budget, least recently used out first."""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch

from edit_ray.cache.stores.held import HeldTensors
from edit_ray.cache.stores.store import Key, Keys, check_budget, check_key

_LARGE = 1 << 20  # bytes


class HostStore(HeldTensors):
    """A `CacheStore` in RAM. `budget_bytes` None means no bound.

    Counts what it refuses (larger than the whole budget) and what it evicts. Not thread-safe: one owner at a time.
    """

    tier = "host"

    def __init__(self, budget_bytes: int | None = None) -> None:
        super().__init__()
        self.budget_bytes = check_budget(budget_bytes)
        self.num_evictions = 0
        self.num_refused = 0

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        check_key(key)
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

    def prefetch(self, keys: Keys) -> None:
        """Nothing to do: every entry is already where `get` finds it."""


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
