"""What every store can do; anything with these methods is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

Key = tuple[str | int | None, ...]


class CacheStore(Protocol):
    """Keeps tensors under keys for as long as its budget allows.

    `get` may return None for anything at any time: whoever asks then recomputes or reloads.
    """

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Keeps a copy of `tensor` under `key`, in place of what was there."""

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor, or None."""

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Says what will be asked for soon, in the order of use."""

    def drop(self, key: Key) -> None:
        """Forgets one entry; an unknown key is no error."""

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        """Forgets every entry whose key meets the condition."""

    def clear(self) -> None:
        """Forgets every entry."""


def check_budget(budget_bytes: int | None) -> int | None:
    """The budget; ValueError if it is none."""
    if budget_bytes is not None and budget_bytes < 0:
        raise ValueError(f"budget_bytes must be 0 or more, or None for no bound; got {budget_bytes}")
    return budget_bytes
