"""The CacheStore actor: the memory that survives the GPU actor."""

from __future__ import annotations

import os
import threading

import torch

from edit_ray.actors.messages import code_version
from edit_ray.cache.stores.host import HostStore
from edit_ray.cache.stores.store import Key


class CacheStoreActor:
    """Owns the host tier. Knows keys and tensors, nothing of runs beyond the key's first field, their id."""

    def __init__(self, budget_bytes: int) -> None:
        self._store = HostStore(budget_bytes)
        self._lock = threading.Lock()

    def describe(self) -> dict[str, str | int]:
        return {"version": code_version(), "pid": os.getpid(), "budget_bytes": self._store.budget_bytes or 0}

    def set_budget(self, budget_bytes: int) -> None:
        """The budget of the runs to come; what is over it goes at the next put."""
        with self._lock:
            self._store.budget_bytes = budget_bytes

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        with self._lock:
            self._store.put(key, tensor)

    def get(self, key: Key) -> torch.Tensor | None:
        with self._lock:
            return self._store.get(key)

    def drop_run(self, run_id: str) -> None:
        with self._lock:
            self._store.drop_where(lambda key: key[0] == run_id)

    def bytes_resident(self) -> int:
        with self._lock:
            return self._store.bytes_resident
