"""The host arena over the disk, as their owner serves them to the process that makes the segments."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeVar

import torch

from edit_ray.cache.stores.allocator import Extent, ExtentAllocator, room_of, rounded
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.direct_io import DiskFull
from edit_ray.cache.stores.disk_tier import DiskTier
from edit_ray.cache.stores.op_table import DONE, NEEDED, SKIPPED, Op, OpTable, table_bytes
from edit_ray.cache.stores.open_segment import Lease, OpenSegment
from edit_ray.cache.stores.store import Key
from edit_ray.cache.tiering import events
from edit_ray.cache.tiering.planner import TierPlanner
from edit_ray.errors import StaleLease

T = TypeVar("T")
TABLES_BYTES = 1 << 20  # of the arena, beyond the host tier's budget
_POLL_S = 0.0005
_LAST = 2**62  # in the order of use, after everything that is planned


class SharedTiers:
    """Carries out what the tier planner decides: places in the arena, files on disk, words in the tables.

    Whatever is written goes to disk at once, so an entry that makes room in the arena has nothing left to move, and
    what a completed segment wrote outlives this process. One thread owns the planner; `prepare` and `complete` may be
    called from any.
    """

    def __init__(self, arena: Arena, host_bytes: int, disk: DiskTier, disk_bytes: int | None = None) -> None:
        """Takes over both. Entries that the disk holds are found; those of segments not completed should be dropped.

        Raises:
            ValueError: the arena is smaller than `host_bytes` and `TABLES_BYTES` together.
        """
        if arena.size_bytes < host_bytes + TABLES_BYTES:
            raise ValueError(f"The arena has {arena.size_bytes} bytes; it needs {host_bytes + TABLES_BYTES}.")
        self.arena, self.disk = arena, disk
        self.planner = TierPlanner([("host", host_bytes), ("disk", disk_bytes)], "furthest_next_use")
        # Tables lie apart: among the entries a small one could take the room of a large one.
        self._allocator, self._tables = ExtentAllocator(rounded(host_bytes)), ExtentAllocator(TABLES_BYTES)
        self._tables_at = rounded(host_bytes)
        self._extents: dict[int, Extent] = {}  # ticket of a place in the host tier -> where it is
        self._saved: dict[Key, Future[bool]] = {}  # of each entry: whether its file is whole
        self._open: dict[tuple[str, int], OpenSegment] = {}
        self._op_of: dict[int, tuple[OpenSegment, int]] = {}
        self._last_request = 0
        self._uses: events.Uses = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = False
        for key, entry in disk.files.entries().items():
            self._saved[key] = _done(True)
            self._handle(events.Found(key, room_of(entry.nbytes), "disk"))
        self._thread = threading.Thread(target=self._serve, name="tiers", daemon=True)
        self._thread.start()

    # What may be called from any thread.

    def follow(self, uses: events.Uses, segment: int = 0) -> None:
        """A run begins, or goes on, with a segment: by which segments each of its entries will be read, and in which
        order within the run. What none of them reads is dropped.
        """
        self._do(lambda: self._follow(uses, segment))

    def prepare(
        self,
        run: str,
        segment: int,
        attempt: int,
        holder: object,
        ops: Sequence[Op],
        dtype: torch.dtype,
        shape: Sequence[int],
    ) -> Lease:
        """Begin to bring what a segment reads, in the order of use, and to make room for what it writes.

        An earlier attempt at the same segment is dropped whole. Raises ValueError where no table is left.
        """
        return self._do(lambda: self._prepare(run, segment, attempt, holder, ops, (dtype, tuple(shape))))

    def complete(self, run: str, segment: int, attempt: int, holder: object) -> None:
        """The segment is made: what it wrote is on disk when this returns, and from now on others may read it.

        Raises:
            StaleLease: another attempt or another holder has the segment.
            OSError: something could not be saved; the segment has to be made again.
        """
        opened, saved = self._do(lambda: self._finish(run, segment, attempt, holder))
        for future in saved:
            future.result()
        self._do(lambda: self._close_segment(run, segment, opened))

    def abandon(self, run: str, segment: int) -> None:
        """Drop an open segment whole; unknown ones are none."""
        self._do(lambda: self._abandon(run, segment))

    def holder_gone(self, holder: object) -> None:
        """Drop every open segment of a holder, whose process must be gone."""
        self._do(lambda: self._holder_gone(holder))

    def drop_run(self, run: str) -> None:
        """Drop all that belongs to a run."""
        self._do(lambda: self._drop_run(run))

    def statistics(self) -> dict[str, Any]:
        """Bytes and peaks of each tier, and all counters."""
        return self._do(self._statistics)

    def check(self) -> None:
        """AssertionError unless all adds up: bytes of every tier, extents of the arena, outcomes of every prefetch."""
        self._do(self._check)

    def flush(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing is on its way between the tiers. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while self._do(lambda: bool(self.planner.tiers.ways)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Entries are still on their way after {timeout_s} s.")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the threads and the arena; what is on disk stays."""
        if not self._closed:
            self._do(lambda: setattr(self, "_closed", True))
            self._thread.join()
            self.disk.close()
            self.arena.close()

    # The thread that owns the planner.

    def _do(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future.result()

    def _serve(self) -> None:
        while not self._closed:
            with suppress(queue.Empty):
                self._inbox.get(timeout=_POLL_S if self._open else None)()
            for opened in list(self._open.values()):
                self._look(opened)

    def _prepare(
        self,
        run: str,
        segment: int,
        attempt: int,
        holder: object,
        ops: Sequence[Op],
        form: tuple[torch.dtype, tuple[int, ...]],
    ) -> Lease:
        if attempt:  # what an earlier attempt has read will be read again
            self._follow(self._uses, segment)
        # Later ones, asked for ahead, stand in line before this one now, and hold what it may need.
        for of_run, later in [which for which in self._open if which[0] == run and which[1] >= segment]:
            self._abandon(of_run, later)
        self._drop([op.key for op in ops if op.writes])
        place = self._tables.allocate(table_bytes(len(ops)))
        if place is None:
            raise ValueError(f"{len(ops)} ops are too many for the {TABLES_BYTES} bytes of the arena's tables.")
        extent = Extent(self._tables_at + place.offset, place.size)
        table = OpTable(self.arena.memory(extent), len(ops))
        table.clear()
        requests = range(self._last_request + 1, self._last_request + 1 + len(ops))
        self._last_request += len(ops)
        opened = OpenSegment(ops, holder, attempt, extent, table, requests, form)
        self._open[run, segment] = opened
        for index, (request, op) in enumerate(zip(requests, ops, strict=True)):
            self._op_of[request] = (opened, index)
            size = room_of(op.size)
            reads, writes = ((), ((op.key, size),)) if op.writes else ((op.key,), ())
            self._handle(events.Prepare(request, reads, writes))
        return Lease(str(self.arena.path), extent, len(ops))

    def _follow(self, uses: events.Uses, segment: int) -> None:
        self._uses = uses
        # One use more than planned, and further off than any: a segment that is made again, even if it was complete and
        # nobody heard of it, reads what its first attempt was the last to read.
        left = {
            key: [*(use for use in of_key if use[0] >= segment), (of_key[-1][0] + 1, _LAST + of_key[-1][1])]
            for key, of_key in uses.items()
            if of_key[-1][0] >= segment
        }
        self._handle(events.Follow(left))
        self._handle(events.Advance(segment))
        self._drop([key for key in self._saved if self._last_read(key) < segment])

    def _last_read(self, key: Key) -> float:
        """The last segment that reads an entry; what is in no plan may be read at any time."""
        of_key = self._uses.get(key)
        return of_key[-1][0] if of_key else math.inf

    def _look(self, opened: OpenSegment) -> None:
        """What the segment has done since the last look."""
        states = opened.table.states()
        if states == opened.seen:
            return
        for index, (before, now) in enumerate(zip(opened.seen, states, strict=True)):
            if before != now and index not in opened.done:
                self._on_state(opened, index, now)
        opened.seen = states

    def _on_state(self, opened: OpenSegment, index: int, state: int) -> None:
        op, request = opened.ops[index], opened.requests[index]
        if state == NEEDED:
            self._handle(events.Need(request))
            return
        opened.done.add(index)
        self._op_of.pop(request, None)
        if state == SKIPPED:
            self._handle(events.Abandon(request))
        elif state == DONE:
            if op.writes:
                self._save(op.key, opened, index)
            self._handle(events.Complete(request))

    def _save(self, key: Key, opened: OpenSegment, index: int) -> None:
        """Write through, from where the segment has put it."""
        extent = Extent(opened.table.place(index) or 0, room_of(opened.ops[index].size))
        dtype, shape = opened.form
        self._saved[key] = self.disk.write(key, self.arena.memory(extent), dtype, shape)

    def _finish(self, run: str, segment: int, attempt: int, holder: object) -> tuple[OpenSegment, list[Future[bool]]]:
        opened = self._open.get((run, segment))
        if opened is None or (opened.attempt, opened.holder) != (attempt, holder):
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._look(opened)
        written = [op.key for op in opened.ops if op.writes]
        return opened, [self._saved[key] for key in written if key in self._saved]

    def _close_segment(self, run: str, segment: int, opened: OpenSegment) -> None:
        if self._open.get((run, segment)) is not opened:
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._release(run, segment)
        self._handle(events.Advance(segment + 1))
        self._drop([key for key in self._saved if self._last_read(key) < segment])

    def _abandon(self, run: str, segment: int) -> None:
        opened = self._open.get((run, segment))
        if opened is not None:
            self._release(run, segment)
            self._drop([op.key for op in opened.ops if op.writes])

    def _release(self, run: str, segment: int) -> None:
        """Take back a segment's table and whatever its ops still hold."""
        opened = self._open.pop((run, segment))
        for index, request in enumerate(opened.requests):
            if index not in opened.done:
                self._op_of.pop(request, None)
                self._handle(events.Abandon(request))
        self._tables.free(Extent(opened.extent.offset - self._tables_at, opened.extent.size))

    def _holder_gone(self, holder: object) -> None:
        for which in [which for which, opened in self._open.items() if opened.holder == holder]:
            self._abandon(*which)

    def _drop_run(self, run: str) -> None:
        for of_run, segment in list(self._open):
            if of_run == run:
                self._abandon(of_run, segment)
        self._drop([key for key in self._saved if key[0] == run])

    def _drop(self, keys: Sequence[Key]) -> None:
        self._handle(events.Drop(tuple(keys)))
        for key in keys:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        if self._saved.pop(key, None) is not None:
            self.disk.drop(key)

    def _check(self) -> None:
        self.planner.check()
        entries, tables = self._extents.values(), [opened.extent for opened in self._open.values()]
        for taken, allocator in ((entries, self._allocator), (tables, self._tables)):
            assert sum(extent.size for extent in taken) + allocator.free_bytes == allocator.size_bytes
        ends = sorted((extent.offset, extent.offset + extent.size) for extent in (*entries, *tables))
        assert all(end <= start for (_, end), (start, _) in pairwise(ends)), "extents overlap"

    def _statistics(self) -> dict[str, Any]:
        tiers = self.planner.tiers.accounts
        return {
            "bytes": {tier.name: tier.resident + tier.reserved for tier in tiers},
            "peak_bytes": {tier.name: tier.peak for tier in tiers},
            "on_disk_bytes": self.disk.files.bytes_resident,
            "entries": len(self._saved),
            "faults": dict(self.disk.files.faults),
            "counters": self.planner.counters,
        }

    # Carrying out.

    def _handle(self, event: events.Event) -> None:
        for instruction in self.planner.handle(event):
            match instruction:
                case events.Granted(request, reads, writes):
                    self._give(request, (*reads, *writes)[0])
                case events.Refused(request):
                    self._give(request, None)
                case events.Free(place):
                    self._free(place)
                case events.Move(source, target):
                    self._move(source, target)

    def _give(self, request: int, place: events.Place | None) -> None:
        if request not in self._op_of:
            return
        opened, index = self._op_of[request]
        extent = None if place is None else self._extent(place)
        opened.table.give(index, None if extent is None else extent.offset)

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

    def _being_written(self, key: Key) -> bool:
        return any(
            op.key == key and op.writes and index not in opened.done
            for opened in self._open.values()
            for index, op in enumerate(opened.ops)
        )

    def _move(self, source: events.Place, target: events.Place) -> None:
        """Down, there is nothing to do but to wait for the file; up, it is read."""
        key, ticket = source.key, target.ticket
        if target.tier == "disk":
            saved = self._saved.get(key)
            if saved is None:
                self._later(lambda: self._handle(events.MoveFailed(ticket, "lost")))
            else:
                saved.add_done_callback(lambda future: self._later(lambda: self._spilled(ticket, future)))
            return
        extent = self._extent(target)
        if extent is None:
            self._later(lambda: self._handle(events.MoveFailed(ticket, "transient")))
            return
        read = self.disk.read(key, self.arena.memory(extent))
        read.add_done_callback(lambda future: self._later(lambda: self._loaded(key, ticket, future)))

    def _later(self, work: Callable[[], None]) -> None:
        self._inbox.put(work)

    def _spilled(self, ticket: int, saved: Future[bool]) -> None:
        failure = _failure_of(saved)
        self._handle(events.Moved(ticket) if failure is None else events.MoveFailed(ticket, failure))

    def _loaded(self, key: Key, ticket: int, read: Future[Any]) -> None:
        failure = _failure_of(read)
        if failure is None and read.result() is None:
            failure = "transient" if self.disk.files.entry(key) is not None else "lost"
        self._handle(events.Moved(ticket) if failure is None else events.MoveFailed(ticket, failure))


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
