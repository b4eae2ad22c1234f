"""What one tier holds: its bytes to the last one, and its entries in the order in which they would go."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from edit_ray.cache.tiering.events import Key, Place
from edit_ray.cache.tiering.eviction import Order


class Account:
    """The bytes of one tier. `budget` None means no bound."""

    def __init__(self, name: str, budget: int | None) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"The budget of the tier {name!r} must be 0 or more, or None for no bound; got {budget}.")
        self.name, self.budget = name, budget
        self.resident = 0  # bytes of entries that are here
        self.reserved = 0  # bytes of places that are being filled
        self.leaving = 0  # of `resident`, bytes on their way to another tier
        self.peak = 0

    @property
    def free(self) -> float:
        """Bytes that are neither resident nor reserved."""
        return math.inf if self.budget is None else self.budget - self.resident - self.reserved

    def could_hold(self, size: int) -> bool:
        """Whether so many bytes fit where nothing else is."""
        return self.budget is None or size <= self.budget

    def reserve(self, size: int) -> None:
        assert size <= self.free, f"{self.name}: {size} bytes do not fit into {self.free}"
        self.reserved += size
        self.peak = max(self.peak, self.resident + self.reserved)

    def fill(self, size: int) -> None:
        """Reserved bytes have become resident."""
        self.reserved -= size
        self.resident += size


@dataclass(slots=True, eq=False)
class Entry:
    """One stored version of a key; `planner` names its states."""

    place: Place
    level: int  # of the tier that holds it, or that it leaves
    pins: int = 0  # requests that read it, or wait for it to be moved
    move: int | None = None  # ticket of its way to another tier
    doomed: bool = False  # nobody finds it any more, but its bytes are still in use
    prefetches: int = 0  # that have brought it here and were not read yet
    rank: tuple[Order, int] | None = None  # where it stands in its tier's ranking

    @property
    def key(self) -> Key:
        return self.place.key

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def evictable(self) -> bool:
        """Neither pinned nor in flight."""
        return self.pins == 0 and self.move is None and not self.doomed


@dataclass(slots=True)
class Ranking:
    """The evictable entries of one tier, in the order in which they go: sorted, so that a change costs O(log n)."""

    bytes: int = 0
    _items: list[tuple[Order, int, Entry]] = field(default_factory=list)

    def add(self, entry: Entry, order: Order) -> None:
        serial = entry.place.ticket
        entry.rank = (order, serial)
        insort(self._items, (order, serial, entry))
        self.bytes += entry.size

    def discard(self, entry: Entry) -> None:
        if entry.rank is not None:
            del self._items[bisect_left(self._items, entry.rank)]
            entry.rank = None
            self.bytes -= entry.size

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, _, entry in self._items)

    def __len__(self) -> int:
        return len(self._items)
