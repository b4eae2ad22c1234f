"""Stores in this process's memory: tensors by reference, on their device, or copied to the host within a budget."""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch

from edit_ray.cache.stores.base import HeldTensors, check_budget
from edit_ray.tiers.reuse_plan import Key, check_key

_LARGE = 1 << 20  # bytes


class GPUStore(HeldTensors[torch.Tensor]):
    """A `CacheStore` that keeps the tensors that are put, on their own device, without a bound."""

    tier = "device"

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        check_key(key)
        self.drop(key)
        self._entries[key] = tensor.detach()
        self.bytes_resident += tensor.nbytes

    def get(self, key: Key) -> torch.Tensor | None:
        return self._entries.get(key)


class CPUOffloadStore(HeldTensors[torch.Tensor]):
    """A `CacheStore` in RAM. `budget_bytes` None means no bound.

    Counts tensors that it refuses (larger than the whole budget) and those that it evicts, least recently used first.
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


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU; a large one in pages of its own, which are returned to the system with it.

    In the C library's heap an aligned block does not fit into the hole of another of its size, so a store that
    replaces large tensors would take more than twice its budget.
    """
    if tensor.nbytes < _LARGE:
        return tensor.to("cpu", copy=True).contiguous()
    memory = mmap(-1, tensor.nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
