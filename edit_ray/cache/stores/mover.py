"""What the tier planner decides, carried out: places in the arena, files on disk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import torch

from edit_ray.cache.stores.allocator import Extent, ExtentAllocator, room_of, rounded
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.direct_io import DiskFull
from edit_ray.cache.stores.disk_tier import DiskTier
from edit_ray.cache.stores.store import Key
from edit_ray.cache.tiering import events
from edit_ray.cache.tiering.planner import TierPlanner


class Mover:
    """The planner of a host tier over a disk tier, and what follows from its instructions.

    Whatever is written goes to disk at once, so a way down moves nothing: it waits for the file. One thread calls it;
    what the disk's threads report comes back to that thread through `later`.
    """

    def __init__(
        self,
        arena: Arena,
        host_bytes: int,
        disk: DiskTier,
        disk_bytes: int | None,
        *,
        later: Callable[[Callable[[], None]], None],
        give: Callable[[int, int | None], None],
        being_written: Callable[[Key], bool],
    ) -> None:
        """Finds what the disk holds.

        Args:
            arena: Its first `host_bytes` are the host tier.
            host_bytes: Of the host tier.
            disk: The disk tier.
            disk_bytes: Of the disk tier; None for no bound.
            later: Has the thread that owns this call something.
            give: Told what a request was granted: an offset in the arena, or None.
            being_written: Whether a segment that is being made writes the key.
        """
        self.arena, self.disk = arena, disk
        self.planner = TierPlanner([("host", host_bytes), ("disk", disk_bytes)], "furthest_next_use")
        self.saved: dict[Key, Future[bool]] = {}  # of each entry: whether its file is whole
        self._allocator = ExtentAllocator(rounded(host_bytes))
        self._extents: dict[int, Extent] = {}  # ticket of a place in the host tier -> where it is
        self._move_seconds = {"host_to_disk": 0.0, "disk_to_host": 0.0}
        self._later, self._give, self._being_written = later, give, being_written
        for key, entry in disk.files.entries().items():
            self.saved[key] = _done(True)
            self.handle(events.Found(key, room_of(entry.nbytes), "disk"))

    def handle(self, event: events.Event) -> None:
        """Tell the planner, and carry out what it says."""
        for instruction in self.planner.handle(event):
            match instruction:
                case events.Granted(request, reads, writes):
                    self._grant(request, (*reads, *writes)[0])
                case events.Refused(request):
                    self._give(request, None)
                case events.Free(place):
                    self._free(place)
                case events.Move(source, target):
                    self._move(source, target)

    def save(self, key: Key, offset: int, size: int, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Write an entry of `size` bytes through to disk, from where it was put in the arena."""
        self.saved[key] = self.disk.write(key, self.arena.memory(Extent(offset, room_of(size))), dtype, shape)

    def drop(self, keys: Sequence[Key]) -> None:
        """Nobody wants these any more, wherever they are."""
        self.handle(events.Drop(tuple(keys)))
        for key in keys:
            self._forget(key)

    def check(self) -> list[Extent]:
        """The extents that are taken; AssertionError unless all adds up."""
        self.planner.check()
        taken = sorted(self._extents.values())
        assert sum(extent.size for extent in taken) + self._allocator.free_bytes == self._allocator.size_bytes
        assert all(one.offset + one.size <= other.offset for one, other in pairwise(taken)), "extents overlap"
        return taken

    def statistics(self) -> dict[str, Any]:
        """Bytes and peaks of each tier, and all counters."""
        tiers = self.planner.tiers.accounts
        return {
            "bytes": {tier.name: tier.resident + tier.reserved for tier in tiers},
            "peak_bytes": {tier.name: tier.peak for tier in tiers},
            "budget_bytes": {tier.name: tier.budget for tier in tiers},
            "entries_in": Counter(entry.place.tier for entry in self.planner.tiers.entries.values()),
            "move_seconds": dict(self._move_seconds),
            "on_disk_bytes": self.disk.files.bytes_resident,
            "entries": len(self.saved),
            "faults": dict(self.disk.files.faults),
            "counters": self.planner.counters,
        }

    def _grant(self, request: int, place: events.Place | None) -> None:
        extent = None if place is None else self._extent(place)
        self._give(request, None if extent is None else extent.offset)

    def _extent(self, place: events.Place) -> Extent | None:
        """Where a place in the host tier is, found for it when it is first asked for."""
        if place.ticket not in self._extents:
            extent = self._allocator.allocate(place.size)
            if extent is None:
                return None
            self._extents[place.ticket] = extent
        return self._extents[place.ticket]

    def _free(self, place: events.Place) -> None:
        if place.tier == "host":
            extent = self._extents.pop(place.ticket, None)
            if extent is not None:
                self._allocator.free(extent)
        if self.planner.place(place.key) is None and not self._being_written(place.key):
            self._forget(place.key)

    def _forget(self, key: Key) -> None:
        if self.saved.pop(key, None) is not None:
            self.disk.drop(key)

    def _move(self, source: events.Place, target: events.Place) -> None:
        """Down, there is nothing to do but to wait for the file; up, it is read."""
        key, ticket, began = source.key, target.ticket, time.monotonic()
        if target.tier == "disk":
            saved = self.saved.get(key)
            if saved is None:
                self._later(lambda: self.handle(events.MoveFailed(ticket, "lost")))
            else:
                saved.add_done_callback(lambda future: self._later(lambda: self._spilled(ticket, began, future)))
            return
        extent = self._extent(target)
        if extent is None:
            self._later(lambda: self.handle(events.MoveFailed(ticket, "transient")))
            return
        read = self.disk.read(key, self.arena.memory(extent))
        read.add_done_callback(lambda future: self._later(lambda: self._loaded(key, ticket, began, future)))

    def _spilled(self, ticket: int, began: float, saved: Future[bool]) -> None:
        self._move_seconds["host_to_disk"] += time.monotonic() - began
        failure = _failure_of(saved)
        self.handle(events.Moved(ticket) if failure is None else events.MoveFailed(ticket, failure))

    def _loaded(self, key: Key, ticket: int, began: float, read: Future[Any]) -> None:
        self._move_seconds["disk_to_host"] += time.monotonic() - began
        failure = _failure_of(read)
        if failure is None and read.result() is None:
            failure = "transient" if self.disk.files.entry(key) is not None else "lost"
        self.handle(events.Moved(ticket) if failure is None else events.MoveFailed(ticket, failure))


def _failure_of(future: Future[Any]) -> events.Failure | None:
    if future.cancelled():
        return "transient"
    error = future.exception()
    if error is None:
        return None
    return "full" if isinstance(error, DiskFull) else "transient"


def _done(value: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(value)
    return future
