"""The same store where its memory cannot be mapped: calls carry the bytes, such as through Ray's object store.

A segment works with a table and memory of its own process (`CarriedTable`). In it a place is there when the store has
been asked for the op, and what was written is sent when the segment is through with it. In the store's process `fetch`
and `keep` do what the segment would have done in shared memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edit_ray.cache.stores.allocator import Extent, ExtentAllocator, room_of
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.heap import HeapArena
from edit_ray.cache.stores.op_table import DONE, NEEDED, SKIPPED, Op, OpTable, table_bytes
from edit_ray.cache.stores.open_segment import OpenSegment
from edit_ray.cache.stores.planned import Waits
from edit_ray.errors import EntryLost, StaleLease

Bytes = NDArray[np.uint8]
CARRIED = 4  # entries that a segment's own memory holds: those in use, and those on their way to or from the device
_POLL_S = 0.0005


class CarriedTable(OpTable):
    """A segment's table over memory of its own, whose places are filled and emptied by calls.

    Args:
        ops: The segment's.
        memory: Of `CARRIED` entries.
        fetch: `fetch(index, skipped)` returns the bytes of a read, None if they are lost.
        keep: `keep(index, data, skipped)` sends those of a write. `skipped` are ops that were passed over before.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        memory: HeapArena,
        fetch: Callable[[int, list[int]], Bytes | None],
        keep: Callable[[int, Bytes, list[int]], None],
    ) -> None:
        super().__init__(memoryview(bytearray(table_bytes(len(ops)))), len(ops))
        self.clear()
        self.waits = Waits()  # a `PlannedStore` has one as well: give it here, and calls for writes count as waits
        self._ops, self._memory, self._fetch, self._keep = ops, memory, fetch, keep
        self._allocator = ExtentAllocator(memory.size_bytes)
        self._extents: dict[int, Extent] = {}
        self._needed: set[int] = set()
        self._skipped: list[int] = []

    def place(self, index: int) -> int | None:
        """See `OpTable`; waits for the call, once it is said that the op is needed."""
        offset = super().place(index)
        if offset == -1 and index in self._needed:
            self._bring(index)
            offset = super().place(index)
        return offset

    def mark(self, index: int, state: int) -> None:
        """See `OpTable`; sends what was written."""
        super().mark(index, state)
        if state == NEEDED:
            self._needed.add(index)
        elif state == SKIPPED:
            self._skipped.append(index)
        elif state == DONE:
            extent = self._extents.pop(index)
            if self._ops[index].writes:
                started = time.perf_counter()
                self._keep(index, self._bytes(index, extent), self._take_skipped())
                self.waits.seconds += time.perf_counter() - started
            self._allocator.free(extent)

    def _bring(self, index: int) -> None:
        extent = self._allocator.allocate(self._ops[index].size)
        if extent is None:
            return  # when copies under way are over there will be room
        if not self._ops[index].writes:
            data = self._fetch(index, self._take_skipped())
            if data is None:
                self._allocator.free(extent)
                return self.give(index, None)
            self._bytes(index, extent)[:] = data
        self._extents[index] = extent
        self.give(index, extent.offset)

    def _bytes(self, index: int, extent: Extent) -> Bytes:
        return _bytes(self._memory, extent.offset, self._ops[index].size)

    def _take_skipped(self) -> list[int]:
        skipped, self._skipped = self._skipped, []
        return skipped


def carried_memory(entry_bytes: int) -> HeapArena:
    """What a `CarriedTable` works in, for entries of one size."""
    return HeapArena(CARRIED * room_of(entry_bytes))


# In the store's process.


def fetch(memory: Arena, opened: OpenSegment, index: int, skipped: Sequence[int], timeout_s: float) -> Bytes | None:
    """A copy of what an op reads; None if it is lost, or not there in time. Raises StaleLease if the segment is given
    up.
    """
    with _used(memory, opened, index, skipped, timeout_s) as place:
        return None if place is None else place.copy()


def keep(memory: Arena, opened: OpenSegment, index: int, data: Bytes, skipped: Sequence[int], timeout_s: float) -> None:
    """What an op writes. Raises StaleLease if the segment is given up, EntryLost if it gets no place in time."""
    with _used(memory, opened, index, skipped, timeout_s) as place:
        if place is None:
            raise EntryLost(f"The store has no place for {opened.ops[index].key}, which the plan wants kept.")
        place[:] = data


@contextmanager
def _used(
    memory: Arena, opened: OpenSegment, index: int, skipped: Sequence[int], timeout_s: float
) -> Iterator[Bytes | None]:
    """The bytes of an op, which is over afterwards; None where it gets no place."""
    for passed in skipped:
        opened.table.mark(passed, SKIPPED)
    offset = _await_place(opened, index, timeout_s)
    with opened.using:
        if opened.closed:
            raise StaleLease("The segment was given to another, or given up.")
        yield None if offset is None else _bytes(memory, offset, opened.ops[index].size)
        if offset is not None:
            opened.table.mark(index, DONE)


def _await_place(opened: OpenSegment, index: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    if opened.table.place(index) == -1:
        opened.table.mark(index, NEEDED)
    while (offset := opened.table.place(index)) == -1 and not opened.closed:
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    return offset


def _bytes(memory: Arena, offset: int, size: int) -> Bytes:
    view: Bytes = np.frombuffer(memory.memory(Extent(offset, room_of(size)))[:size], dtype=np.uint8)
    return view
