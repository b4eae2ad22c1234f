"""Stores stacked into tiers, fastest first: an entry that a tier has no room for spills into the next one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edit_ray.cache.stores.base import CacheStore, Keys, check_budget, keys_of
from edit_ray.cache.stores.eviction import EVICTIONS, EvictionPolicy
from edit_ray.tiers.entry_file import FULL
from edit_ray.tiers.reuse_plan import Key, check_key

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, eq=False)
class _Stored:
    key: Key
    size: int
    level: int
    device: torch.device | None = None  # from which it was put, and to which it returns


@dataclass(eq=False)
class _Level:
    """One tier: its store and its entries."""

    name: str
    store: CacheStore
    budget: int | None
    eviction: EvictionPolicy
    used: int = 0
    entries: dict[Key, _Stored] = field(default_factory=dict)

    def could_hold(self, size: int) -> bool:
        """Whether `size` bytes fit into the empty tier."""
        return self.budget is None or size <= self.budget

    def add(self, entry: _Stored) -> None:
        self.entries[entry.key] = entry
        self.used += entry.size

    def remove(self, entry: _Stored) -> None:
        del self.entries[entry.key]
        self.used -= entry.size

    def ranked(self) -> list[_Stored]:
        """The entries in eviction order. There are few, as each is a residual of a unit."""
        return [self.entries[key] for key in sorted(self.entries, key=self.eviction.order)]

    def victims(self, size: int) -> list[_Stored]:
        """The entries to evict so that `size` bytes fit."""
        short, found = 0 if self.budget is None else self.used + size - self.budget, []
        for entry in self.ranked() if short > 0 else ():
            if entry.size and short > 0:
                found.append(entry)
                short -= entry.size
        return found


class TieredStore:
    """A `CacheStore` of several, given from fast to slow, each with the bytes it may hold, or None for no bound.

    An entry is put into the first tier that could hold it if it were empty. If that is full, the first entry by
    `eviction` spills into the next tier that could hold it; from the last tier it is evicted. `num_spills` and
    `num_evictions` count that, `num_refused` entries that are larger than every tier. With `promote`, an entry that
    `get` finds moves up again. The stores should have no bound of their own. Thread-safe.

    `eviction` is "lru", the least recently used first; another registered name; or an EvictionPolicy object. `drops`
    counts the entries that left all tiers, by reason.

    Examples:
        >>> TieredStore([(GPUStore(), 384 << 20), (CPUOffloadStore(), 768 << 20), (DiskOffloadStore(directory), None)])
    """

    def __init__(
        self,
        tiers: Sequence[tuple[CacheStore, int | None]],
        promote: bool = True,
        eviction: str | EvictionPolicy = "lru",
    ) -> None:
        """Raises ValueError: no tier, two of one name, a budget below 0, or an unknown eviction policy."""
        names = [str(getattr(store, "tier", type(store).__name__)) for store, _ in tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"The tiers are {', '.join(names) or 'none'}; there must be at least one, each under a name of its own "
                "(the attribute `tier` of its store)."
            )
        self.promote = promote
        self.num_spills = 0  # moves down, one for each entry and tier
        self.num_refused = 0  # tensors larger than every tier
        self.drops: Counter[str] = Counter()
        self._eviction = eviction if isinstance(eviction, EvictionPolicy) else EVICTIONS.find(eviction)()
        self._levels = [
            _Level(name, store, check_budget(budget), self._eviction)
            for name, (store, budget) in zip(names, tiers, strict=True)
        ]
        self._entries: dict[Key, _Stored] = {}
        self._lock = threading.RLock()
        for level, tier in enumerate(self._levels):
            held: dict[Key, int] = tier.store.sizes() if hasattr(tier.store, "sizes") else {}
            for key, size in held.items():
                self._adopt(key, size, level)

    @property
    def num_evictions(self) -> int:
        """Entries that were dropped because the last tier was full."""
        return self.drops["evicted"]

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes in each tier, by its name."""
        return {tier.name: tier.used for tier in self._levels}

    @property
    def bytes_resident(self) -> int:
        """Bytes in all tiers."""
        return sum(tier.used for tier in self._levels)

    def tier_of(self, key: Key) -> str | None:
        """The name of the tier that holds an entry, or None. Never promotes the entry."""
        entry = self._entries.get(key)
        return None if entry is None else self._levels[entry.level].name

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises ValueError for a dtype that a tier does not hold (its `check_dtype`); nothing is kept then."""
        check_key(key)
        with self._lock:
            self.drop(key)
            self._check_dtype(tensor.dtype)
            size = tensor.nbytes
            if not any(tier.could_hold(size) for tier in self._levels):
                self.num_refused += 1
                return
            self._eviction.touch(key)
            try:
                if place := self._find_place(key, size, range(len(self._levels))):
                    level, victims = place
                    self._make_room(level, victims)
                    entry = _Stored(key, size, level, tensor.device)
                    if self._write(level, key, tensor):
                        self._keep(entry)
                    else:
                        self.drops["full"] += 1
            finally:
                if key not in self._entries:
                    self._eviction.forget(key)

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor or None. One from the host or the disk is on the CPU, unless it is promoted to the device."""
        with self._lock:
            self._eviction.read(key)
            entry = self._entries.get(key)
            if entry is None:
                return None
            if self.promote and (place := self._find_place(key, entry.size, range(entry.level))):
                self._move(entry, *place)
            tensor = self._levels[entry.level].store.get(key) if key in self._entries else None
            if tensor is None and key in self._entries:  # lost by the store itself
                self._drop(entry, "lost")
        return tensor

    def prefetch(self, keys: Keys) -> None:
        """Move entries up, in the order of use, until the first tier is full of them; also without `promote`."""
        with self._lock:
            first, chosen = self._levels[0], list[_Stored]()
            for entry in [self._entries[key] for key in dict.fromkeys(keys_of(keys)) if key in self._entries]:
                if first.could_hold(entry.size):
                    if not first.could_hold(entry.size + sum(one.size for one in chosen)):
                        break
                    chosen.append(entry)
            for entry in reversed(chosen):  # so that what is used last is evicted first
                self._eviction.touch(entry.key)
            for entry in chosen:
                if entry.level > 0 and entry.key in self._entries:
                    self._move(entry, 0, first.victims(entry.size))

    def drop(self, key: Key) -> None:
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                self._drop(entry, "dropped")

    def clear(self) -> None:
        with self._lock:
            for key in list(self._entries):
                self.drop(key)

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, from the slowest tier to the fastest, in eviction order."""
        with self._lock:
            return {entry.key: entry.size for tier in reversed(self._levels) for entry in tier.ranked()}

    def __len__(self) -> int:
        return len(self._entries)

    # Entries

    def _adopt(self, key: Key, size: int, level: int) -> None:
        """Take over an entry that a tier holds already. It is dropped if it does not fit."""
        tier = self._levels[level]
        if key in self._entries or not tier.could_hold(size):
            tier.store.drop(key)
            return
        for victim in tier.victims(size):
            self._drop(victim, "evicted")
        self._eviction.touch(key)
        self._keep(_Stored(key, size, level))

    def _keep(self, entry: _Stored) -> None:
        self._entries[entry.key] = entry
        self._levels[entry.level].add(entry)

    def _drop(self, entry: _Stored, reason: str) -> None:
        tier = self._levels[entry.level]
        tier.remove(entry)
        tier.store.drop(entry.key)
        del self._entries[entry.key]
        self._eviction.forget(entry.key)
        self.drops[reason] += 1

    # Moves

    def _find_place(self, key: Key, size: int, levels: range) -> tuple[int, list[_Stored]] | None:
        """The first of these tiers in which an entry would not be the first to be evicted, and what has to leave it."""
        order = self._eviction.order(key)
        for level in levels:
            tier = self._levels[level]
            victims = tier.victims(size) if tier.could_hold(size) else None
            if victims is not None and all(self._eviction.order(victim.key) <= order for victim in victims):
                return level, victims
        return None

    def _make_room(self, level: int, victims: list[_Stored]) -> None:
        """Spill entries of a tier. Raises what a store raises; the entry that it refused is dropped then."""
        for victim in victims:
            if place := self._find_place(victim.key, victim.size, range(level + 1, len(self._levels))):
                self._move(victim, *place)
            else:
                self._drop(victim, "evicted")

    def _move(self, entry: _Stored, level: int, victims: list[_Stored]) -> None:
        """Move an entry to another tier, which victims leave. If that fails, an entry that moves down is dropped; one
        that moves up stays where it was.
        """
        source, target, down = self._levels[entry.level], self._levels[level], level > entry.level
        tensor = source.store.get(entry.key)
        if tensor is None:
            return self._drop(entry, "lost")
        source.remove(entry)  # an entry that spills from above may take its place
        reason = "spill_failed"
        try:
            self._make_room(level, victims)
            if target.name == "device" and entry.device is not None:
                tensor = tensor.to(entry.device)
            if self._write(level, entry.key, tensor):
                source.store.drop(entry.key)
                entry.level = level
                self.num_spills += down
            else:
                reason = "full"
        finally:
            self._levels[entry.level].add(entry)
            if entry.level != level:
                self._drop(entry, reason) if down else self._make_room(entry.level, source.victims(0))

    def _write(self, level: int, key: Key, tensor: torch.Tensor) -> bool:
        """Put a tensor into a tier with room for it; False if the store is full below its budget, twice."""
        tier = self._levels[level]
        for attempt in (1, 2):
            try:
                tier.store.put(key, tensor)
                return True
            except OSError as error:
                if error.errno not in FULL:
                    raise
            short = tensor.nbytes if attempt == 1 else 0
            for victim in tier.ranked():
                if short > 0:
                    short -= victim.size
                    self._drop(victim, "evicted")
        return False

    def _check_dtype(self, dtype: torch.dtype) -> None:
        for tier in self._levels:
            if hasattr(tier.store, "check_dtype"):
                try:
                    tier.store.check_dtype(dtype)
                except ValueError as error:
                    raise ValueError(f"The tier {tier.name} does not take {dtype}: {error}") from None
