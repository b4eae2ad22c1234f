"""The host arena over the disk, as their owner serves them to the process that makes the segments."""

from __future__ import annotations

import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import torch

from edit_ray.cache.stores.allocator import Extent, ExtentAllocator, room_of, rounded
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.disk_tier import DiskTier
from edit_ray.cache.stores.heap import HeapArena
from edit_ray.cache.stores.holders import began_before, is_gone
from edit_ray.cache.stores.mover import Mover
from edit_ray.cache.stores.op_table import DONE, NEEDED, SKIPPED, Op, OpTable, table_bytes
from edit_ray.cache.stores.open_segment import Lease, OpenSegment
from edit_ray.cache.stores.store import Key
from edit_ray.cache.tiering import events
from edit_ray.errors import StaleLease

T = TypeVar("T")
_log = logging.getLogger(__name__)
TABLES_BYTES = 1 << 20  # of the arena, beyond the host tier's budget
_POLL_S, _GONE_POLL_S = 0.0005, 0.05  # between looks at open segments, and at whether a holder is gone
_LAST = 2**62  # in the order of use, after everything that is planned


class SharedTiers:
    """Serves the tiers to the segments of runs: gives each op its place, and makes what a segment wrote visible.

    What a completed segment wrote outlives this process, as it is on disk. One thread owns the planner; the public
    methods may be called from any.

    A holder is a process that writes into the arena by itself (`holders`). What was given to it and is taken back,
    because another has its segment now, stays as it is until the process is gone: its last copies may be on their way.
    """

    def __init__(
        self,
        arena: Arena,
        host_bytes: int,
        disk: DiskTier,
        disk_bytes: int | None = None,
        *,
        is_gone: Callable[[object], bool] = is_gone,
    ) -> None:
        """Takes over both. `is_gone` says whether a holder cannot write any more. Entries that the disk holds
        are found; those of segments not completed should be dropped.

        Raises:
            ValueError: the arena is smaller than `host_bytes` and `TABLES_BYTES` together.
        """
        if arena.size_bytes < host_bytes + TABLES_BYTES:
            raise ValueError(f"The arena has {arena.size_bytes} bytes; it needs {host_bytes + TABLES_BYTES}.")
        self.arena, self.disk = arena, disk
        self._is_gone = is_gone
        self.incarnation = secrets.token_hex(8)
        # Tables lie apart: among the entries a small one could take the room of a large one.
        self._tables, self._tables_at = ExtentAllocator(TABLES_BYTES), rounded(host_bytes)
        self._open: dict[tuple[str, int], OpenSegment] = {}
        self._orphans: list[OpenSegment] = []  # taken from holders that may still write
        self._holders: dict[str, object] = {}  # of each run, the last
        self._op_of: dict[int, tuple[OpenSegment, int]] = {}
        self._last_request = 0
        self._stale = 0  # calls that were refused
        self._uses: events.Uses = {}
        # No SimpleQueue: its `get` never returns if it finds the queue empty when its time is over already.
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self._closed = False
        self.failed = False  # by an error in its thread: the arena is closed, and every call is refused
        self._mover = Mover(
            arena,
            host_bytes,
            disk,
            disk_bytes,
            later=self._inbox.put,
            give=self._give,
            being_written=self._being_written,
        )
        self.planner = self._mover.planner
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

        An earlier attempt at the same segment is dropped whole.

        Raises:
            StaleLease: a holder that began later has the run, and lives.
            ValueError: no table is left.
        """
        return self._do(lambda: self._prepare(run, segment, attempt, holder, ops, (dtype, tuple(shape))))

    def complete(self, run: str, segment: int, attempt: int, holder: object, store: str = "") -> None:
        """The segment is made: what it wrote is safe on disk when this returns, and from now on others may read it.

        `store` is the incarnation that gave the lease; "" for this one, whichever it is.

        Raises:
            StaleLease: another attempt, another holder or another store has the segment.
            OSError: something could not be saved; the segment has to be made again.
        """
        opened, saved = self._do(lambda: self._finish(run, segment, attempt, holder, store))
        for future in saved.values():
            future.result()
        self.disk.sync(list(saved))
        self._do(lambda: self._close_segment(run, segment, opened))

    def opened(self, run: str, segment: int, attempt: int, holder: object, store: str = "") -> OpenSegment:
        """A segment that is being made. Raises StaleLease as `complete` does."""
        return self._do(lambda: self._of(run, segment, attempt, holder, store))

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Which of these entries no complete segment has left here."""
        return self._do(lambda: self._missing(keys))

    def give_up(self, run: str, holder: object) -> None:
        """A holder is through with a run, whatever it has not completed."""
        self._do(lambda: self._give_up(run, holder))

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
            with suppress(StaleLease):  # its thread has failed meanwhile
                self._do(self._end)
        self._thread.join()
        self.disk.close()
        self.arena.close()

    # The thread that owns the planner.

    def _do(self, work: Callable[[], T]) -> T:
        if not self._thread.is_alive():
            raise StaleLease("This store is closed.")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                if isinstance(error, StaleLease):
                    self._stale += 1
                future.set_exception(error)

        self._inbox.put(run)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():
                    raise
                if not self._thread.is_alive():
                    raise StaleLease("This store is closed.") from None

    def _serve(self) -> None:
        try:
            self._serve_until_closed()
        except Exception:
            _log.exception("The tiers are closed, as what keeps them has failed; what is on disk stays.")
            self.failed = True
            self._end()
            self.arena.close()

    def _serve_until_closed(self) -> None:
        looked = 0.0
        while not self._closed:
            with suppress(queue.Empty):
                self._inbox.get(timeout=_POLL_S if self._open else _GONE_POLL_S if self._orphans else None)()
            for opened in list(self._open.values()):
                self._look(opened)
            if self._orphans and time.monotonic() - looked > _GONE_POLL_S:
                looked = time.monotonic()
                self._take_back_orphans()

    def _end(self) -> None:
        self._closed = True
        for opened in self._open.values():
            opened.close()

    def _prepare(
        self,
        run: str,
        segment: int,
        attempt: int,
        holder: object,
        ops: Sequence[Op],
        form: tuple[torch.dtype, tuple[int, ...]],
    ) -> Lease:
        later = self._holders.get(run)
        if began_before(holder, later) and not self._is_gone(later):
            raise StaleLease(f"The run {run!r} was given to the process {later}, which began later.")
        self._holders[run] = holder
        if attempt:  # what an earlier attempt has read will be read again
            self._follow(self._uses, segment)
        # Later ones, asked for ahead, stand in line before this one now, and hold what it may need.
        for which, opened in list(self._open.items()):
            if which[0] == run and (which[1] >= segment or opened.holder != holder):
                self._abandon(*which, by=holder)
        self._mover.drop([op.key for op in ops if op.writes or self._is_another(op.key, form)])
        place = self._tables.allocate(table_bytes(len(ops)))
        if place is None:
            raise ValueError(f"{len(ops)} ops are too many for the {TABLES_BYTES} bytes of the arena's tables.")
        extent = Extent(self._tables_at + place.offset, place.size)
        table = OpTable(self.arena.memory(extent), len(ops))
        table.clear()
        requests = range(self._last_request + 1, self._last_request + 1 + len(ops))
        self._last_request += len(ops)
        opened = self._open[run, segment] = OpenSegment(ops, holder, attempt, extent, table, requests, form)
        for index, (request, op) in enumerate(zip(requests, ops, strict=True)):
            self._op_of[request] = (opened, index)
            size = room_of(op.size)
            reads, writes = ((), ((op.key, size),)) if op.writes else ((op.key,), ())
            self._mover.handle(events.Prepare(request, reads, writes))
        path = "" if isinstance(self.arena, HeapArena) else str(self.arena.path)
        return Lease(path, extent, len(ops), self.incarnation)

    def _is_another(self, key: Key, form: tuple[torch.dtype, tuple[int, ...]]) -> bool:
        """Whether what the disk holds under a key is a tensor of another type or shape."""
        entry = self.disk.files.entry(key)
        return entry is not None and (entry.dtype, entry.shape) != form

    def _follow(self, uses: events.Uses, segment: int) -> None:
        self._uses = uses
        # One use more than planned, and further off than any: a segment that is made again, even if it was complete and
        # nobody heard of it, reads what its first attempt was the last to read.
        left = {
            key: [*(use for use in of_key if use[0] >= segment), (of_key[-1][0] + 1, _LAST + of_key[-1][1])]
            for key, of_key in uses.items()
            if of_key[-1][0] >= segment
        }
        self._mover.handle(events.Follow(left))
        self._mover.handle(events.Advance(segment))
        self._drop_read_before(segment)

    def _drop_read_before(self, segment: int) -> None:
        """What is in no plan may be read at any time."""
        last_reads = {key: self._uses[key][-1][0] if self._uses.get(key) else math.inf for key in self._mover.saved}
        self._mover.drop([key for key, last in last_reads.items() if last < segment])

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
            self._mover.handle(events.Need(request))
            return
        opened.done.add(index)
        self._op_of.pop(request, None)
        if state == SKIPPED:
            self._mover.handle(events.Abandon(request))
        elif state == DONE:
            if op.writes:
                self._mover.save(op.key, opened.table.place(index) or 0, op.size, *opened.form)
            self._mover.handle(events.Complete(request))

    def _of(self, run: str, segment: int, attempt: int, holder: object, store: str) -> OpenSegment:
        opened = self._open.get((run, segment))
        known = None if opened is None else (opened.attempt, opened.holder, self.incarnation)
        if opened is None or known != (attempt, holder, store or self.incarnation):
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        return opened

    def _finish(
        self, run: str, segment: int, attempt: int, holder: object, store: str
    ) -> tuple[OpenSegment, dict[Key, Future[bool]]]:
        opened, saved = self._of(run, segment, attempt, holder, store), self._mover.saved
        self._look(opened)
        return opened, {op.key: saved[op.key] for op in opened.ops if op.writes and op.key in saved}

    def _close_segment(self, run: str, segment: int, opened: OpenSegment) -> None:
        if self._open.get((run, segment)) is not opened:
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._take_back(self._open.pop((run, segment)))
        self._mover.handle(events.Advance(segment + 1))
        self._drop_read_before(segment)

    def _abandon(self, run: str, segment: int, by: object) -> None:
        """Drop an open segment whole; what its holder may still write to is taken back when that cannot be any more."""
        opened = self._open.pop((run, segment))
        self._mover.drop([op.key for op in opened.ops if op.writes])
        if opened.holder == by or self._is_gone(opened.holder):
            self._take_back(opened)
        else:
            self._end_ops(opened, [index for index in range(len(opened.ops)) if opened.table.place(index) == -1])
            self._orphans.append(opened)

    def _missing(self, keys: Sequence[Key]) -> list[Key]:
        unfinished = {op.key for opened in self._open.values() for op in opened.ops if op.writes}
        return [key for key in keys if key in unfinished or self.planner.place(key) is None]

    def _take_back_orphans(self) -> None:
        gone = [opened for opened in self._orphans if self._is_gone(opened.holder)]
        self._orphans = [opened for opened in self._orphans if opened not in gone]
        for opened in gone:
            self._take_back(opened)

    def _take_back(self, opened: OpenSegment) -> None:
        """A segment's table and whatever its ops still hold."""
        opened.close()
        self._end_ops(opened, range(len(opened.ops)))
        self._tables.free(Extent(opened.extent.offset - self._tables_at, opened.extent.size))

    def _end_ops(self, opened: OpenSegment, indices: Iterable[int]) -> None:
        """Give up those of a segment's ops that are not over."""
        for index in indices:
            if index not in opened.done:
                opened.done.add(index)
                self._op_of.pop(opened.requests[index], None)
                self._mover.handle(events.Abandon(opened.requests[index]))

    def _give_up(self, run: str, holder: object) -> None:
        for which in [which for which, opened in self._open.items() if which[0] == run and opened.holder == holder]:
            self._abandon(*which, by=holder)

    def _drop_run(self, run: str) -> None:
        self._holders.pop(run, None)
        for of_run, segment in list(self._open):
            if of_run == run:
                self._abandon(of_run, segment, by=None)
        self._mover.drop([key for key in self._mover.saved if key[0] == run])

    def _give(self, request: int, offset: int | None) -> None:
        if request in self._op_of:
            opened, index = self._op_of[request]
            opened.table.give(index, offset)

    def _being_written(self, key: Key) -> bool:
        return any(
            op.key == key and op.writes and index not in opened.done
            for opened in self._open.values()
            for index, op in enumerate(opened.ops)
        )

    def _check(self) -> None:
        entries = self._mover.check()
        tables = [opened.extent for opened in (*self._open.values(), *self._orphans)]
        assert sum(extent.size for extent in tables) + self._tables.free_bytes == self._tables.size_bytes
        assert all(extent.offset + extent.size <= self._tables_at for extent in entries), "an entry among the tables"
        assert all(extent.offset >= self._tables_at for extent in tables), "a table among the entries"

    def _statistics(self) -> dict[str, Any]:
        return {**self._mover.statistics(), "stale_leases": self._stale, "orphans": len(self._orphans)}
