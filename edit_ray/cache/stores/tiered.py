"""Stores stacked into tiers, fastest first: the planner of `tiering` decides what is where, this carries it out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from edit_ray.cache.stores.direct_io import DiskFull, as_disk_full
from edit_ray.cache.stores.store import CacheStore, Key, Keys, check_budget, check_key, keys_of
from edit_ray.cache.tiering.events import (
    Abandon,
    Advance,
    Complete,
    Drop,
    Event,
    Failure,
    Follow,
    Found,
    Free,
    Full,
    Granted,
    Move,
    Moved,
    MoveFailed,
    Place,
    Prefetch,
    Read,
    Uses,
    Write,
)
from edit_ray.cache.tiering.eviction import EvictionPolicy
from edit_ray.cache.tiering.planner import TierPlanner
from edit_ray.cache.tiering.residency import STAGING


class TieredStore:
    """A `CacheStore` of several, given from fast to slow, each with the bytes it may hold, or None for no bound.

    An entry goes into the first tier that could hold it were it empty. Where that is full, what goes first by
    `eviction` spills into the next one that could hold it, and out of the last it is evicted: `num_spills` and
    `num_evictions` count that, `num_refused` what is larger than every tier. With `promote`, what `get` finds moves up
    again. The stores should have no bound of their own. Threads take turns.

    `eviction` is "lru", the least recently used first; "furthest_next_use", which wants `follow` and `advance`, goes by
    a reuse plan; or another registered name, or an EvictionPolicy object. `counters` has all that was counted.

    Examples:
        >>> TieredStore([(GPUStore(), 384 << 20), (CPUOffloadStore(), 768 << 20), (DiskOffloadStore(directory), None)])
    """

    def __init__(
        self,
        tiers: Sequence[tuple[CacheStore, int | None]],
        promote: bool = True,
        eviction: str | EvictionPolicy = "lru",
    ) -> None:
        """Raises ValueError: no tier, two of the same name, a budget below 0, or no such eviction policy."""
        names = [str(getattr(store, "tier", type(store).__name__)) for store, _ in tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"The tiers are {', '.join(names) or 'none'}; valid is at least one, each under a name of its own "
                "(the attribute `tier` of its store)."
            )
        self.promote = promote
        budgets = [(name, check_budget(budget_bytes)) for name, (_, budget_bytes) in zip(names, tiers, strict=True)]
        self._planner = TierPlanner(budgets, eviction, staging_bytes=None)  # what is moved up is in hand for a moment
        self._stores = {name: store for name, (store, _) in zip(names, tiers, strict=True)}
        self._in_hand: dict[Key, torch.Tensor] = {}
        self._devices: dict[Key, torch.device] = {}  # from which an entry was put, and to which it returns
        self._requests = 0
        self._lock = threading.RLock()
        for name, store in self._stores.items():
            held: dict[Key, int] = store.sizes() if hasattr(store, "sizes") else {}
            for key, size in held.items():
                self._handle(Found(key, size, name))
        self.counters = self._planner.counters

    @property
    def num_spills(self) -> int:
        """Moves down, one for each entry and tier."""
        return self.counters.spills

    @property
    def num_evictions(self) -> int:
        """Entries that had to go, because the last tier was full."""
        return self.counters.drops.get("evicted", 0)

    @property
    def num_refused(self) -> int:
        """Tensors larger than every tier."""
        return self.counters.refusals.get("too_large", 0)

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes in each tier, by its name."""
        return {account.name: account.resident for account in self._planner.tiers.accounts if account.name != STAGING}

    @property
    def bytes_resident(self) -> int:
        """Bytes in all tiers."""
        return sum(self.tier_bytes.values())

    def tier_of(self, key: Key) -> str | None:
        """The name of the tier that holds an entry, None if none does; moves nothing."""
        place = self._planner.place(key)
        return None if place is None else place.tier

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises ValueError for a type that a tier does not hold (its `check_dtype`); nothing is left then."""
        check_key(key)
        with self._lock:
            self.drop(key)
            self._check_dtype(tensor.dtype)
            with self._request(Write(self._next(), key, tensor.nbytes)) as granted:
                (place,) = granted.writes
                fits = place is None or self._write(place, tensor)
            if not fits:
                self._handle(Drop((key,), "full"))

    def get(self, key: Key) -> torch.Tensor | None:
        """The tensor or None; from the tiers host and disk it is on the CPU, unless it is promoted to the device."""
        with self._lock, self._request(Read(self._next(), key, self.promote)) as granted:
            (place,) = granted.reads
            tensor = None if place is None else self._stores[place.tier].get(key)
            if place is not None and tensor is None:  # lost by the store itself
                self._handle(Drop((key,), "lost"))
        return tensor

    def prefetch(self, keys: Keys) -> None:
        """Move entries up, in the order of use, until the first tier is full of them; with `promote` off as well.

        It returns when they have moved.
        """
        with self._lock:
            self._handle(Prefetch(self._next(), keys_of(keys)))

    def follow(self, uses: Uses) -> None:
        """Go by this plan, at position 0: for each key that will be read, at which positions, and in which order."""
        with self._lock:
            self._handle(Follow(uses))

    def advance(self, position: int) -> None:
        """The plan has come to this position: the index of the segment that is made now."""
        with self._lock:
            self._handle(Advance(position))

    def drop(self, key: Key) -> None:
        with self._lock:
            self._handle(Drop((key,)))

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        with self._lock:
            self._handle(Drop(tuple(key for key in self._planner.sizes() if condition(key))))

    def clear(self) -> None:
        self.drop_where(lambda key: True)

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, from the slowest tier to the fastest, in the order in which they would go."""
        return self._planner.sizes()

    def __len__(self) -> int:
        return len(self._planner)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        for name, store in self._stores.items():
            if hasattr(store, "check_dtype"):
                try:
                    store.check_dtype(dtype)
                except ValueError as error:
                    raise ValueError(f"The tier {name} does not take {dtype}: {error}") from None

    def _next(self) -> int:
        self._requests += 1
        return self._requests

    @contextmanager
    def _request(self, event: Read | Write) -> Iterator[Granted]:
        """What is granted, which here is at once; nothing of it stays if the stores fail."""
        try:
            granted = self._handle(event)
            assert granted is not None
            yield granted
        except BaseException:
            self._handle(Abandon(event.request))
            raise
        self._handle(Complete(event.request))

    def _handle(self, event: Event) -> Granted | None:
        """Tell the planner, and carry out at once whatever follows from it; the grant, if there is one.

        Raises what a store raises, when all else has been carried out.
        """
        todo, granted, error = deque(self._planner.handle(event)), None, None
        while todo:
            instruction = todo.popleft()
            if isinstance(instruction, Granted):
                granted = instruction
            elif isinstance(instruction, Free):
                self._free(instruction.place)
            elif isinstance(instruction, Move):
                failure: Failure | None = "transient"
                try:
                    failure = self._move(instruction.source, instruction.target)
                except BaseException as raised:
                    failure = "full" if _is_full(raised) else "transient"
                    error = error if failure == "full" else raised
                ticket = instruction.target.ticket
                todo.extend(self._planner.handle(MoveFailed(ticket, failure) if failure else Moved(ticket)))
        if error is not None:
            raise error
        return granted

    def _write(self, place: Place, tensor: torch.Tensor) -> bool:
        """Put a tensor where it was granted a place; False if that is full below its budget, twice."""
        store = self._stores[place.tier]
        self._devices[place.key] = tensor.device
        try:
            store.put(place.key, tensor)
        except OSError as error:
            if not _is_full(error):
                raise
            self._handle(Full(place.tier, place.size))
            try:
                store.put(place.key, tensor)
            except OSError as again:
                if not _is_full(again):
                    raise
                return False
        return True

    def _move(self, source: Place, target: Place) -> Failure | None:
        key = source.key
        tensor = self._in_hand.get(key) if source.tier == STAGING else self._stores[source.tier].get(key)
        if tensor is None:
            return "lost"
        if target.tier == STAGING:
            self._in_hand[key] = tensor
            return None
        if target.tier == "device" and key in self._devices:
            tensor = tensor.to(self._devices[key])
        self._stores[target.tier].put(key, tensor)
        return None

    def _free(self, place: Place) -> None:
        if place.tier == STAGING:
            self._in_hand.pop(place.key, None)
        else:
            self._stores[place.tier].drop(place.key)
        if self._planner.place(place.key) is None:
            self._devices.pop(place.key, None)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and isinstance(as_disk_full(error), DiskFull)
