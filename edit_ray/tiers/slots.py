"""The host tier's memory as equal slots: a slab for each entry size, a free list, and a queue by next use.

A run's entries have one size or a few, known before the run, so no general allocator is needed. The entry whose next
planned use is furthest in the future gives up its slot first (Belady 1966), before it what no plan reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

from edit_ray.tiers.reuse_plan import Key

PAGE = 4096  # bytes: what direct I/O asks of offsets and lengths


def whole_pages(size: int) -> int:
    """`size` bytes rounded up to pages."""
    return -(-size // PAGE) * PAGE


def slot_bytes(size: int) -> int:
    """Bytes of the slot of an entry of `size` bytes; one without bytes has a slot as well."""
    return whole_pages(max(size, 1))


def divide(host_bytes: int, demand: Mapping[int, int]) -> dict[int, int]:
    """How many slots of each size `host_bytes` have room for.

    `demand` says how many entries of each size are in use at a time: bytes are shared out in proportion, and every size
    has one slot at least.
    """
    wanted = Counter[int]()
    for size, entries in demand.items():
        wanted[slot_bytes(size)] += max(entries, 1)
    total = sum(size * entries for size, entries in wanted.items())
    return {size: max(1, host_bytes * entries // total) for size, entries in sorted(wanted.items())}


@dataclass(slots=True, eq=False)
class TierEntry:
    """One stored version of a key."""

    key: Key
    size: int  # of its slot
    offset: int | None = None  # of its slot, if it has one
    saved: bool = False  # its file is whole
    users: int = 0  # ops that use its slot, or wait for it to be loaded
    loading: bool = False
    gone: bool = False  # nobody finds it any more; the slot is free when its last user ends
    stamp: int = 0  # of its latest place in the ranking

    @property
    def evictable(self) -> bool:
        return self.offset is not None and self.saved and not (self.users or self.loading or self.gone)


@dataclass
class _Slab:
    """The slots of one size."""

    free: list[int]
    ranked: list[tuple[float, int, TierEntry]] = field(default_factory=list)  # a heap; passed over if out of date


class Slots:
    """Slots of the host tier, in use or free. `slots` gives their number by their size, a multiple of `PAGE`; they lie
    in this order from offset 0.
    """

    def __init__(self, slots: Mapping[int, int]) -> None:
        self.used = self.peak = 0  # bytes
        self._slabs: dict[int, _Slab] = {}
        self._stamp = end = 0
        for size, number in slots.items():
            self._slabs[size] = _Slab([end + size * index for index in reversed(range(number))])
            end += size * number

    def __contains__(self, size: int) -> bool:
        return size in self._slabs

    def take(self, size: int) -> tuple[int | None, TierEntry | None]:
        """The offset of a free slot, or of the evictable entry that is used last, with that entry; else None."""
        slab = self._slabs[size]
        if slab.free:
            self.used += size
            self.peak = max(self.peak, self.used)
            return slab.free.pop(), None
        while slab.ranked:
            _, stamp, entry = heappop(slab.ranked)
            if entry.stamp == stamp and entry.evictable and entry.offset is not None:
                offset, entry.offset = entry.offset, None
                return offset, entry
        return None, None

    def free(self, size: int, offset: int) -> None:
        """Take a slot back."""
        self._slabs[size].free.append(offset)
        self.used -= size

    def leave(self, entry: TierEntry) -> None:
        """Take an entry's slot back."""
        if entry.offset is not None:
            self.free(entry.size, entry.offset)
            entry.offset = None

    def rank(self, entry: TierEntry, next_use: float) -> None:
        """An evictable entry, by when it is used next: its order in the plan."""
        self._stamp += 1
        entry.stamp = self._stamp
        heappush(self._slabs[entry.size].ranked, (-next_use, entry.stamp, entry))

    def rank_none(self) -> None:
        """The plan has changed: every entry is ranked anew."""
        for slab in self._slabs.values():
            slab.ranked = []

    def check(self, taken: Iterable[tuple[int, int]]) -> None:
        """AssertionError unless these (offset, size) and the free slots are all that there is, without an overlap."""
        in_use = list(taken)
        assert self.used == sum(size for _, size in in_use)
        free = [(offset, size) for size, slab in self._slabs.items() for offset in slab.free]
        end = 0
        for offset, size in sorted([*in_use, *free]):
            assert offset == end, f"the slot at {end} is lost, or has two users"
            end = offset + size
