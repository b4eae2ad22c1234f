"""The host tier's memory as equal slots: for each entry size a free list, and a queue by next use.

A run's entries have one size or a few, known before the run, so no general allocator is needed. The entry whose next
planned use is furthest in the future is evicted first (Belady 1966), before it what no plan reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from edit_ray.tiers.reuse_plan import Key

PAGE = 4096  # bytes: what direct I/O asks of offsets and lengths


def whole_pages(size: int) -> int:
    """`size` bytes rounded up to pages."""
    return -(-size // PAGE) * PAGE


def slot_bytes(size: int) -> int:
    """Bytes of the slot of an entry of `size` bytes; one without bytes has a slot as well."""
    return whole_pages(max(size, 1))


def divide(host_bytes: int, demand: Mapping[int, int]) -> dict[int, int]:
    """The number of slots of each slot size in `host_bytes`, shared in proportion to the bytes in use.

    `demand` is the number of entries of each size that are in use at a time. Every size has one slot at least: only
    where one of each is more than `host_bytes` is the sum more.
    """
    wanted = Counter[int]()
    for size, entries in demand.items():
        wanted[slot_bytes(size)] += max(entries, 1)
    slots = dict.fromkeys(sorted(wanted), 1)
    while True:
        total = sum(size * entries for size, entries in wanted.items())
        poor = [size for size, entries in wanted.items() if host_bytes * entries < total]  # less than one slot
        if not poor:
            return slots | {size: host_bytes * entries // total for size, entries in wanted.items()}
        for size in poor:
            host_bytes -= size
            del wanted[size]


@dataclass(slots=True, eq=False)
class AskedOp:
    """One op as it is asked for. Numbers grow and are used once; `size` is that of the slot in bytes."""

    number: int
    key: Key
    size: int
    writes: bool
    # What follows is the planner's.
    entry: TierEntry | None = None  # that a read uses
    offset: int | None = None  # once given
    needed: bool = False  # the segment waits for it
    prefetch: bool = False  # a read from outside the host tier whose outcome is still open


@dataclass(slots=True, eq=False)
class TierEntry:
    """One stored version of a key."""

    key: Key
    size: int  # of its slot, in bytes
    offset: int | None = None  # of its slot, if it has one
    saved: bool = False  # its file is complete
    users: int = 0  # ops that use its slot, or wait for it to be loaded
    waiting: list[AskedOp] | None = None  # the ops that wait while it is being loaded
    gone: bool = False  # no longer visible; its slot is free after its last user
    stamp: int = 0  # of its latest rank

    @property
    def evictable(self) -> bool:
        return self.offset is not None and self.saved and not (self.users or self.waiting is not None or self.gone)


class Slots:
    """The slots of the host tier. `slots` gives their number by size in bytes, a multiple of `PAGE`; they lie in this
    order from offset 0.
    """

    def __init__(self, slots: Mapping[int, int]) -> None:
        self.used = self.peak = 0  # bytes
        self._free: dict[int, list[int]] = {}
        self._ranked: dict[int, list[tuple[float, int, TierEntry]]] = {}  # heaps; stale items are skipped
        self._stamps = count(1)
        end = 0
        for size, number in slots.items():
            self._free[size], self._ranked[size] = [end + size * index for index in reversed(range(number))], []
            end += size * number

    def __contains__(self, size: int) -> bool:
        return size in self._free

    def take(self, size: int) -> tuple[int | None, bool]:
        """The offset of a slot, and whether an entry was evicted from it; (None, False) if none can be had."""
        if self._free[size]:
            self.used += size
            self.peak = max(self.peak, self.used)
            return self._free[size].pop(), False
        while self._ranked[size]:
            _, stamp, entry = heappop(self._ranked[size])
            if entry.stamp == stamp and entry.evictable:
                offset, entry.offset = entry.offset, None
                return offset, True
        return None, False

    def free(self, size: int, offset: int | None) -> None:
        """Take back a slot, if there is one."""
        if offset is not None:
            self._free[size].append(offset)
            self.used -= size

    def rank(self, entry: TierEntry, next_use: float) -> None:
        """Queue an evictable entry by the order of its next use in the plan."""
        entry.stamp = next(self._stamps)
        heappush(self._ranked[entry.size], (-next_use, entry.stamp, entry))

    def rank_none(self) -> None:
        """Clear all ranks, as the order of use has changed; the caller then ranks every entry."""
        for ranked in self._ranked.values():
            ranked.clear()
