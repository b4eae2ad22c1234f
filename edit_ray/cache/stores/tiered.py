"""Stores stacked into tiers, fastest first: an entry that a tier has no room for spills into the next one."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edit_ray.cache.stores.base import CacheStore, Keys, check_budget, keys_of
from edit_ray.cache.stores.eviction import EvictionPolicy, Order, make_eviction
from edit_ray.tiers.reuse_plan import Key, Uses, check_key

if TYPE_CHECKING:
    import torch

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True, eq=False)
class _Stored:
    key: Key
    size: int
    level: int
    device: torch.device | None = None  # from which it was put, and to which it returns
    rank: tuple[Order, int] | None = None


@dataclass(eq=False)
class _Level:
    """One tier: its store, and its entries in eviction order."""

    name: str
    store: CacheStore
    budget: int | None
    used: int = 0
    ranked: list[tuple[Order, int, _Stored]] = field(default_factory=list)

    def could_hold(self, size: int) -> bool:
        """Whether `size` bytes fit into the empty tier."""
        return self.budget is None or size <= self.budget

    def victims(self, size: int) -> list[_Stored]:
        """The entries to evict so that `size` bytes fit."""
        short, found = 0 if self.budget is None else self.used + size - self.budget, []
        for _, _, entry in self.ranked if short > 0 else ():
            if entry.size and short > 0:
                found.append(entry)
                short -= entry.size
        return found

    def accepts(self, size: int, order: Order) -> bool:
        """Whether a new entry of this size and order would not be the first to be evicted."""
        victims = self.victims(size) if self.could_hold(size) else None
        return victims is not None and all(victim.rank is None or victim.rank[0] <= order for victim in victims)


class TieredStore:
    """A `CacheStore` of several, given from fast to slow, each with the bytes it may hold, or None for no bound.

    An entry is put into the first tier that could hold it if it were empty. If that is full, the first entry by
    `eviction` spills into the next tier that could hold it; from the last tier it is evicted. `num_spills` and
    `num_evictions` count that, `num_refused` entries that are larger than every tier. With `promote`, an entry that
    `get` finds moves up again. The stores should have no bound of their own. Thread-safe.

    `eviction` is "lru", the least recently used first; "furthest_next_use", which follows a reuse plan by `follow` and
    `advance`; another registered name; or an EvictionPolicy object. `drops` counts the entries that left all tiers, by
    reason.

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
                f"The tiers are {', '.join(names) or 'none'}; valid is at least one, each under a name of its own "
                "(the attribute `tier` of its store)."
            )
        self.promote = promote
        self.num_spills = 0  # moves down, one for each entry and tier
        self.num_refused = 0  # tensors larger than every tier
        self.drops: Counter[str] = Counter()
        self._levels = [
            _Level(name, store, check_budget(budget)) for name, (store, budget) in zip(names, tiers, strict=True)
        ]
        self._eviction = make_eviction(eviction)
        self._entries: dict[Key, _Stored] = {}
        self._serial = 0
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
        """The name of the tier that holds an entry, None if none does; does not move it."""
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
                level = None if self._eviction.dead(key) else self._best_level(size, self._eviction.order(key), 0)
                if level is not None:
                    self._make_room(level, size)
                    entry = _Stored(key, size, level, tensor.device)
                    if self._write(level, entry, tensor):
                        self._entries[key] = entry
                        self._rank(entry)
                    else:
                        self.drops["full"] += 1
            finally:
                if key not in self._entries:
                    self._eviction.forget(key)

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor or None. One from the host or the disk is on the CPU, unless it is promoted to the device."""
        with self._lock:
            if self._eviction.read(key):
                self._rerank(self._entries)
            entry = self._entries.get(key)
            if entry is None:
                return None
            if self.promote and not self._eviction.dead(key):
                target = self._best_level(entry.size, self._eviction.order(key), 0, entry.level)
                if target is not None:
                    self._unrank(entry)
                    self._move(entry, target)
            tensor = self._levels[entry.level].store.get(key) if key in self._entries else None
            if tensor is None and key in self._entries:  # lost by the store itself
                self._drop(entry, "lost")
            self._rerank((key,))
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
            for entry in chosen:
                self._unrank(entry)  # none of them makes room for another
            try:
                for entry in chosen:
                    if entry.level > 0:
                        self._move(entry, 0)
            finally:
                for entry in reversed(chosen):  # so that what is used last is evicted first
                    if entry.key in self._entries:
                        self._eviction.touch(entry.key)
                        self._rerank((entry.key,))

    def follow(self, uses: Uses) -> None:
        """Follow this plan from position 0: the position and the order of each read, by key."""
        with self._lock:
            self._eviction.follow(uses)
            self._rerank(self._entries)

    def advance(self, position: int) -> None:
        """The plan has reached this position: the index of the current segment."""
        with self._lock:
            self._rerank(self._eviction.advance(position))

    def drop(self, key: Key) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._drop(entry, "dropped")

    def clear(self) -> None:
        with self._lock:
            for key in list(self._entries):
                self.drop(key)

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, from the slowest tier to the fastest, in eviction order."""
        return {entry.key: entry.size for tier in reversed(self._levels) for _, _, entry in tier.ranked}

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
        tier.used += size
        self._eviction.touch(key)
        self._entries[key] = entry = _Stored(key, size, level)
        self._rank(entry)

    def _drop(self, entry: _Stored, reason: str) -> None:
        self._unrank(entry)
        del self._entries[entry.key]
        self._eviction.forget(entry.key)
        tier = self._levels[entry.level]
        tier.used -= entry.size
        tier.store.drop(entry.key)
        self.drops[reason] += 1

    def _rank(self, entry: _Stored) -> None:
        """Insert an entry into its tier's eviction order, or drop it if it is known that nobody reads it again."""
        if self._eviction.dead(entry.key):
            return self._drop(entry, "dead")
        self._serial += 1
        entry.rank = (self._eviction.order(entry.key), self._serial)
        insort(self._levels[entry.level].ranked, (*entry.rank, entry))

    def _unrank(self, entry: _Stored) -> None:
        if entry.rank is not None:
            ranked = self._levels[entry.level].ranked
            del ranked[bisect_left(ranked, entry.rank)]
            entry.rank = None

    def _rerank(self, keys: Iterable[Key]) -> None:
        """The order of these keys has changed."""
        for entry in [self._entries[key] for key in keys if key in self._entries]:
            self._unrank(entry)
            self._rank(entry)

    # Moves

    def _best_level(self, size: int, order: Order, first: int, last: int | None = None) -> int | None:
        """The first tier from `first` to before `last` that accepts an entry of this size and order."""
        levels = range(first, len(self._levels) if last is None else last)
        return next((level for level in levels if self._levels[level].accepts(size, order)), None)

    def _make_room(self, level: int, size: int) -> None:
        """Spill until `size` bytes fit. Raises what a store raises; the entry that it refused is dropped then."""
        for victim in self._levels[level].victims(size):
            order = self._eviction.order(victim.key)
            self._unrank(victim)
            lower = self._best_level(victim.size, order, level + 1)
            if lower is None:
                self._drop(victim, "evicted")
            else:
                self._move(victim, lower)
                if victim.key in self._entries:
                    self._rank(victim)

    def _move(self, entry: _Stored, level: int) -> None:
        """Move an entry to another tier and make room there. If that fails, an entry that moves down is dropped; one
        that moves up stays where it was.
        """
        source, down = self._levels[entry.level], level > entry.level
        tensor = source.store.get(entry.key)
        if tensor is None:
            return self._drop(entry, "lost")
        before = entry.level
        source.used -= entry.size  # an entry that spills from above may take its place
        try:
            self._make_room(level, entry.size)
            if self._levels[level].name == "device" and entry.device is not None:
                tensor = tensor.to(entry.device)
            kept = self._write(level, entry, tensor)
        except BaseException:
            source.used += entry.size
            if down:
                self._drop(entry, "spill_failed")
            else:
                self._make_room(before, 0)
                self._rank(entry)
            raise
        if kept:
            source.store.drop(entry.key)
            entry.level = level
            self.num_spills += down
        else:
            source.used += entry.size
            self._drop(entry, "full") if down else self._make_room(before, 0)

    def _write(self, level: int, entry: _Stored, tensor: torch.Tensor) -> bool:
        """Put a tensor into a tier with room for it; False if the store is full below its budget, twice."""
        tier = self._levels[level]
        for attempt in (1, 2):
            try:
                tier.store.put(entry.key, tensor)
                tier.used += entry.size
                return True
            except OSError as error:
                if error.errno not in _FULL:
                    raise
            short = entry.size if attempt == 1 else 0
            for _, _, victim in list(tier.ranked):
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
