"""Stores stacked into tiers, fastest first: each within a byte budget, what is in the way moves one down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from edit_ray.cache.stores.store import CacheStore, Key, check_budget


@dataclass(frozen=True)
class _Entry:
    size: int
    device: torch.device | None  # from which it was put, and to which it returns; None for what a store held before


class _Tier:
    """One store, what it holds, and how much it may hold."""

    def __init__(self, store: CacheStore, budget_bytes: int | None) -> None:
        self.store, self.budget_bytes = store, check_budget(budget_bytes)
        self.name: str = getattr(store, "tier", type(store).__name__)
        held: dict[Key, int] = store.sizes() if hasattr(store, "sizes") else {}
        self.entries = {key: _Entry(size, None) for key, size in held.items()}  # least recently used first
        self.bytes = sum(held.values())

    def could_hold(self, size: int) -> bool:
        return self.budget_bytes is None or size <= self.budget_bytes

    def put(self, key: Key, tensor: torch.Tensor, device: torch.device | None) -> None:
        self.store.put(key, tensor)
        self.entries[key] = _Entry(tensor.nbytes, device)
        self.bytes += tensor.nbytes

    def touch(self, key: Key) -> None:
        self.entries[key] = self.entries.pop(key)

    def drop(self, key: Key) -> None:
        self.bytes -= self.entries.pop(key).size
        self.store.drop(key)


class TieredStore:
    """A `CacheStore` of several, given from fast to slow, each with the bytes it may hold, or None for no bound.

    An entry goes into the first tier that could hold it were it empty. Where that is full, the least recently used
    entries spill into the next one that could hold them, and out of the last they are evicted: `num_spills` and
    `num_evictions` count them, `num_refused` what is larger than every tier. With `promote`, what `get` finds moves up
    again. The stores should have no bound of their own. Not thread-safe: one owner at a time.

    >>> TieredStore([(GPUStore(), 384 << 20), (CPUOffloadStore(), 768 << 20), (DiskOffloadStore(directory), None)])
    """

    def __init__(self, tiers: Sequence[tuple[CacheStore, int | None]], promote: bool = True) -> None:
        """Raises ValueError: no tier, two of the same name, or a budget below 0."""
        self._tiers = [_Tier(store, budget_bytes) for store, budget_bytes in tiers]
        names = [tier.name for tier in self._tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"The tiers are {', '.join(names) or 'none'}; valid is at least one, each under a name of its own "
                "(the attribute `tier` of its store)."
            )
        self.promote = promote
        self.num_spills = self.num_evictions = self.num_refused = 0
        for level, tier in enumerate(self._tiers):
            for key in [key for key in tier.entries if self._level_of(key) != level]:
                tier.drop(key)
        for level in range(len(self._tiers)):
            self._make_room(level, 0)

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes in each tier, by its name."""
        return {tier.name: tier.bytes for tier in self._tiers}

    @property
    def bytes_resident(self) -> int:
        """Bytes in all tiers."""
        return sum(tier.bytes for tier in self._tiers)

    def tier_of(self, key: Key) -> str | None:
        """The name of the tier that holds an entry, None if none does; moves nothing."""
        level = self._level_of(key)
        return None if level is None else self._tiers[level].name

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        self.drop(key)
        level = self._level_for(tensor.nbytes, 0)
        if level is None:
            self.num_refused += 1
        else:
            self._put(key, tensor, tensor.device, level)

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor or None; from the tiers host and disk it is on the CPU, unless it is promoted to the device."""
        level = self._level_of(key)
        return None if level is None else self._fetch(key, level, self.promote)

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Move entries up, in the order of use, until the first tier is full of them; with `promote` off as well.

        For now it returns when they have moved.
        """
        first, staged, total = self._tiers[0], [], 0
        for key in keys:
            level = self._level_of(key)
            size = 0 if level is None else self._tiers[level].entries[key].size
            if level is None or not first.could_hold(size):
                continue
            if not first.could_hold(total + size):
                break
            if self._fetch(key, level, promote=True) is not None:
                staged.append(key)
                total += size
        for key in reversed(staged):
            first.touch(key)  # so that what is used last makes way first

    def drop(self, key: Key) -> None:
        level = self._level_of(key)
        if level is not None:
            self._tiers[level].drop(key)

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        for key in [key for tier in self._tiers for key in tier.entries if condition(key)]:
            self.drop(key)

    def clear(self) -> None:
        self.drop_where(lambda key: True)

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, from the slowest tier to the fastest, least recently used first."""
        return {key: entry.size for tier in reversed(self._tiers) for key, entry in tier.entries.items()}

    def __len__(self) -> int:
        return sum(len(tier.entries) for tier in self._tiers)

    def _level_of(self, key: Key) -> int | None:
        return next((level for level, tier in enumerate(self._tiers) if key in tier.entries), None)

    def _level_for(self, size: int, first: int) -> int | None:
        """The first tier from `first` on that could hold so many bytes were it empty."""
        return next((i for i in range(first, len(self._tiers)) if self._tiers[i].could_hold(size)), None)

    def _fetch(self, key: Key, level: int, promote: bool) -> torch.Tensor | None:
        tier = self._tiers[level]
        tensor = tier.store.get(key)
        if tensor is None:  # lost by the store itself
            tier.drop(key)
            return None
        target = self._level_for(tensor.nbytes, 0) if promote else None
        if target is None or target >= level:
            tier.touch(key)
            return tensor
        device = tier.entries[key].device
        if device is not None and self._tiers[target].name == "device":
            tensor = tensor.to(device)
        tier.drop(key)
        self._put(key, tensor, device, target)
        return tensor

    def _put(self, key: Key, tensor: torch.Tensor, device: torch.device | None, level: int) -> None:
        self._make_room(level, tensor.nbytes)
        self._tiers[level].put(key, tensor, device)

    def _make_room(self, level: int, size: int) -> None:
        """Move out what is in the way of so many bytes, least recently used first."""
        tier = self._tiers[level]
        while not tier.could_hold(tier.bytes + size):
            victim, entry = next(iter(tier.entries.items()))
            lower = self._level_for(entry.size, level + 1)
            tensor = None if lower is None else tier.store.get(victim)
            tier.drop(victim)
            if lower is None:
                self.num_evictions += 1
            elif tensor is not None:
                self._put(victim, tensor, entry.device, lower)
                self.num_spills += 1
