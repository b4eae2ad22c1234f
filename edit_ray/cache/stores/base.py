"""The interface of every store, and the base of those that hold tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from edit_ray.tiers.reuse_plan import Key

if TYPE_CHECKING:
    import torch

Keys = Key | Iterable[Key]


class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_HasBytes)


class CacheStore(Protocol):
    """Keeps tensors under keys for as long as its budget allows.

    `get` may return None for anything at any time: the caller then recomputes or reloads. A tensor that was put belongs
    to the store, and `get` may return the store's own: neither may be changed in place. `GPUStore` keeps and returns
    the same tensor, `CPUOffloadStore` keeps and returns its own copy, `DiskOffloadStore` returns a new copy each time;
    `TieredStore` does as the tier that holds the entry.
    """

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Keep `tensor` under `key`, replacing an earlier one. Raises TypeError for what is not a key."""

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor, or None."""

    def prefetch(self, keys: Keys) -> None:
        """Announce reads: one key, or several in the order of use."""

    def drop(self, key: Key) -> None:
        """Forget one entry; an unknown key is not an error."""

    def clear(self) -> None:
        """Forget every entry."""


def keys_of(keys: Keys) -> tuple[Key, ...]:
    """One key or several as several: a key is a tuple, and none of its parts is one."""
    several = tuple(keys)
    if isinstance(keys, tuple) and several and not isinstance(several[0], tuple):
        return (several,)  # type: ignore[return-value]
    return several  # type: ignore[return-value]


def check_budget(budget_bytes: int | None) -> int | None:
    """The budget. Raises ValueError if it is not valid."""
    whole = isinstance(budget_bytes, int) and not isinstance(budget_bytes, bool)
    if budget_bytes is not None and (not whole or budget_bytes < 0):
        raise ValueError(
            f"budget_bytes must be a whole number of bytes from 0, or None for no bound; got {budget_bytes!r}"
        )
    return budget_bytes


class HeldTensors(Generic[T]):
    """Tensors by key, oldest first, and their bytes. A subclass adds `put` and `get`. Not thread-safe."""

    def __init__(self) -> None:
        self.bytes_resident = 0
        self._entries: OrderedDict[Key, T] = OrderedDict()

    def drop(self, key: Key) -> None:
        tensor = self._entries.pop(key, None)
        if tensor is not None:
            self.bytes_resident -= tensor.nbytes

    def clear(self) -> None:
        self._entries.clear()
        self.bytes_resident = 0

    def prefetch(self, keys: Keys) -> None:
        """Do nothing: `get` finds every entry."""

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, the least recently put or used first."""
        return {key: tensor.nbytes for key, tensor in self._entries.items()}

    def __len__(self) -> int:
        return len(self._entries)
