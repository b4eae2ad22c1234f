"""Extents of an arena: best fit at aligned offsets, neighbours merged as soon as they are free."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

ALIGNMENT = 4096  # bytes: what direct I/O asks of offsets and lengths, and the size of a page


class Extent(NamedTuple):
    """Contiguous bytes of an arena, both figures multiples of `ALIGNMENT`."""

    offset: int
    size: int


def rounded(size: int) -> int:
    """`size` bytes rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def room_of(size: int) -> int:
    """Bytes of the arena that an entry of `size` bytes takes; an entry without bytes has a place as well."""
    return rounded(max(size, 1))


class ExtentAllocator:
    """Gives out parts of `size_bytes` (rounded down to `ALIGNMENT`) and takes them back.

    Of the free ranges that are large enough, the smallest is used, and of these the lowest. So residuals, which have
    few sizes, fit where others of their size have been. Both directions take O(log n) comparisons.
    """

    def __init__(self, size_bytes: int) -> None:
        """Raises ValueError for less than one page."""
        if size_bytes < ALIGNMENT:
            raise ValueError(f"size_bytes is {size_bytes}; valid is {ALIGNMENT} or more.")
        self.size_bytes = size_bytes // ALIGNMENT * ALIGNMENT
        self.free_bytes = self.size_bytes
        self._taken: dict[int, int] = {}  # offset -> size
        self._by_size = [(self.size_bytes, 0)]  # (size, offset) of the free ranges, sorted
        self._start_of = {self.size_bytes: 0}  # a free range's end -> its offset
        self._size_at = {0: self.size_bytes}  # a free range's offset -> its size

    def allocate(self, size: int) -> Extent | None:
        """An extent of `room_of(size)` bytes, or None while no free range is that large."""
        room = room_of(size)
        index = bisect_left(self._by_size, (room, 0))
        if index == len(self._by_size):
            return None
        found, offset = self._by_size[index]
        self._forget_free(offset, found)
        if found > room:
            self._add_free(offset + room, found - room)
        self._taken[offset] = room
        self.free_bytes -= room
        return Extent(offset, room)

    def free(self, extent: Extent) -> None:
        """Takes an extent back. Raises ValueError for one that is not given out, such as one freed before."""
        if self._taken.get(extent.offset) != extent.size:
            raise ValueError(f"{extent} is not given out: it was freed before, or is of another arena.")
        del self._taken[extent.offset]
        self.free_bytes += extent.size
        start, end = extent.offset, extent.offset + extent.size
        before, after = self._start_of.get(start), self._size_at.get(end)
        if before is not None:
            self._forget_free(before, start - before)
            start = before
        if after is not None:
            self._forget_free(end, after)
            end += after
        self._add_free(start, end - start)

    def free_ranges(self) -> list[Extent]:
        """Every free range, by offset; no two touch."""
        return [Extent(offset, self._size_at[offset]) for offset in sorted(self._size_at)]

    def _add_free(self, offset: int, size: int) -> None:
        insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._start_of[offset + size] = offset

    def _forget_free(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._size_at[offset]
        del self._start_of[offset + size]
