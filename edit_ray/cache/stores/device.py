"""The device tier: tensors where they are, by reference."""

from __future__ import annotations

import torch

from edit_ray.cache.stores.held import HeldTensors
from edit_ray.cache.stores.store import Key, Keys, check_key


class GPUStore(HeldTensors):
    """A `CacheStore` that keeps the tensors it is given, on their own device, without a bound; they belong to it then.

    Not thread-safe: one owner at a time.
    """

    tier = "device"

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        check_key(key)
        self.drop(key)
        self._entries[key] = tensor.detach()
        self.bytes_resident += tensor.nbytes

    def get(self, key: Key) -> torch.Tensor | None:
        return self._entries.get(key)

    def prefetch(self, keys: Keys) -> None:
        """Nothing to do: every entry is already where it is used."""
