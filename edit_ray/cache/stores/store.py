"""What every store can do; anything with these methods is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Protocol

import torch

Key = tuple[str | int | None, ...]
Keys = Key | Iterable[Key]
_PARTS = (str, Integral, type(None))


class CacheStore(Protocol):
    """Keeps tensors under keys for as long as its budget allows.

    `get` may return None for anything at any time: whoever asks then recomputes or reloads. A tensor that was put
    belongs to the store, and one that was got may be the store's own: neither may be changed in place. `GPUStore` keeps
    and returns the very tensor, `CPUOffloadStore` a copy of its own at every `get`, `DiskOffloadStore` a new copy each
    time; `TieredStore` does as the tier where the entry is.
    """

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Keeps `tensor` under `key`, in place of what was there. Raises TypeError for what is no key."""

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor, or None."""

    def prefetch(self, keys: Keys) -> None:
        """Says what will be asked for soon: one key, or several in the order of use."""

    def drop(self, key: Key) -> None:
        """Forgets one entry; an unknown key is no error."""

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        """Forgets every entry whose key meets the condition."""

    def clear(self) -> None:
        """Forgets every entry."""


def check_key(key: Key) -> None:
    """Raises TypeError for what is no key."""
    wrong = [key] if not isinstance(key, tuple) else [part for part in key if not isinstance(part, _PARTS)]
    if wrong:
        kind = type(wrong[0]).__name__
        raise TypeError(f"A key is a tuple of str, int and None; got {str(key)[:80]}, with {wrong[0]!r}, a {kind}.")


def keys_of(keys: Keys) -> tuple[Key, ...]:
    """Several keys, of one or of several: a key is a tuple, and none of its parts is one."""
    several = tuple(keys)
    if isinstance(keys, tuple) and several and not isinstance(several[0], tuple):
        return (several,)  # type: ignore[return-value]
    return several  # type: ignore[return-value]


def check_budget(budget_bytes: int | None) -> int | None:
    """The budget; ValueError if it is none."""
    whole = isinstance(budget_bytes, int) and not isinstance(budget_bytes, bool)
    if budget_bytes is not None and (not whole or budget_bytes < 0):
        raise ValueError(
            f"budget_bytes must be a whole number of bytes from 0, or None for no bound; got {budget_bytes!r}"
        )
    return budget_bytes
