"""What stores have in common that hold tensors themselves, in this process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

from edit_ray.cache.stores.store import Key


class HeldTensors:
    """Tensors by key, in order, and their bytes; whoever inherits says by `put` and `get` which are kept, and where."""

    def __init__(self) -> None:
        self.bytes_resident = 0
        self._entries: OrderedDict[Key, torch.Tensor] = OrderedDict()

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
        """Bytes of every entry, the one kept or used longest ago first."""
        return {key: tensor.nbytes for key, tensor in self._entries.items()}

    def __len__(self) -> int:
        return len(self._entries)
