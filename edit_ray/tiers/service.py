"""Serves the arena and the disk tier, in the CacheStore actor, to the processes that make segments."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edit_ray.errors import StaleLease
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.entry_file import DiskFull
from edit_ray.tiers.planner import Give, Instruction, Load, LoadFailure, Remove, Save, SaveFailure, TierPlanner
from edit_ray.tiers.protocol import DONE, NEEDED, SKIPPED, Lease, Op, OpTable, began_before, is_gone, table_bytes
from edit_ray.tiers.reuse_plan import Key, Uses
from edit_ray.tiers.slots import AskedOp, TierEntry, slot_bytes, whole_pages

T = TypeVar("T")
_log = logging.getLogger(__name__)
TABLES_BYTES = 1 << 20  # of the arena, beyond the slots
_POLL_S, _GONE_POLL_S = 0.0005, 0.05  # between polls of op tables, and of whether a holder is gone


@dataclass(eq=False)
class _OpenSegment:
    """A segment that is prepared and not complete; op i has the planner's number `first` + i."""

    ops: Sequence[Op]
    holder: object
    attempt: int
    table_at: int
    table: OpTable
    first: int
    seen: NDArray[np.int64]  # the states at the last poll
    saves: dict[Key, Future[bool]] = field(default_factory=dict)

    @property
    def table_end(self) -> int:
        return self.table_at + whole_pages(table_bytes(len(self.ops)))

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.ops))


class TierService:
    """Gives each op of the runs' segments its slot, and makes what a segment wrote visible and durable.

    What a completed segment wrote outlives this process, as it is on disk. One thread owns the planner; any thread may
    call the public methods.

    A holder is a process that writes into the arena itself (`protocol.this_process`). Slots that it was given and that
    are taken back, because another holder has its segment now, stay taken until the process is gone: its last copies
    may be in flight.
    """

    def __init__(self, arena: Arena, slots: Mapping[int, int], disk: DiskTier, disk_bytes: int | None = None) -> None:
        """Take over arena and disk, and find the entries on the disk.

        Args:
            arena: At least as many bytes as the slots, and `TABLES_BYTES`.
            slots: Number of slots by their size; see `slots.divide`.
            disk: The disk tier.
            disk_bytes: Its bound, counted in slots' sizes; None for no bound.
        """
        self.arena, self.disk = arena, disk
        self.incarnation = secrets.token_hex(8)
        self.failed = False  # by an error in its thread: the arena is closed, and every call is refused
        self.planner = TierPlanner(
            slots, disk_bytes, [(key, slot_bytes(entry.nbytes)) for key, entry in disk.files.entries().items()]
        )
        self._budgets = {"host": sum(size * number for size, number in slots.items()), "disk": disk_bytes}
        self._open: dict[tuple[str, int], _OpenSegment] = {}
        self._orphans: list[_OpenSegment] = []  # taken from holders that may still write
        self._holders: dict[str, object] = {}  # the last of each run
        self._next_number = 1
        self._stale = 0  # refused calls
        self._move_seconds = {"host_to_disk": 0.0, "disk_to_host": 0.0}
        # No SimpleQueue: its `get` never returns if it finds the queue empty when its timeout is over already.
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="tiers", daemon=True)
        self._thread.start()

    # What may be called from any thread.

    def follow(self, uses: Uses, segment: int = 0) -> None:
        """A run begins or continues with a segment: when each of its entries will be read. Entries that no segment from
        this one on reads are dropped.
        """
        self._do(lambda: self._act(self.planner.follow(uses, segment)))

    def prepare(self, run: str, segment: int, attempt: int, holder: object, ops: Sequence[Op]) -> Lease:
        """Begin to load a segment's reads, in the order of use, and to make room for its writes. An earlier attempt at
        the same segment is dropped whole.

        Raises:
            StaleLease: a holder that began later has the run, and lives.
            ValueError: no table is left.
        """
        return self._do(lambda: self._prepare(run, segment, attempt, holder, ops))

    def complete(self, run: str, segment: int, attempt: int, holder: object, store: str) -> None:
        """The segment is made: what it wrote is durable when this returns, and visible to others from then on.

        `store` is the incarnation that gave the lease.

        Raises:
            StaleLease: another attempt, another holder or another store has the segment.
            OSError: something could not be saved; the segment has to be made again.
        """
        opened = self._do(lambda: self._finished(run, segment, attempt, holder, store))
        for save in opened.saves.values():
            save.result()
        self.disk.files.sync(list(opened.saves))
        self._do(lambda: self._close_segment(run, segment, opened))

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """The entries among `keys` that no complete segment has left here."""

        def missing() -> list[Key]:
            unfinished = {op.key for opened in self._open.values() for op in opened.ops if op.writes}
            return [key for key in keys if key in unfinished or key not in self.planner.entries]

        return self._do(missing)

    def give_up(self, run: str, holder: object) -> None:
        """A holder has ended its work on a run, whatever it has not completed."""
        self._do(lambda: self._abandon(run, holder, lambda _, opened: opened.holder == holder))

    def drop_run(self, run: str) -> None:
        """Drop everything that belongs to a run."""

        def drop() -> None:
            self._holders.pop(run, None)
            self._abandon(run, None, lambda *_: True)
            self._act(self.planner.drop([key for key in self.planner.entries if key and key[0] == run]))

        self._do(drop)

    def statistics(self) -> dict[str, Any]:
        """Bytes, peaks and entries of each tier, and all counts."""
        return self._do(self._statistics)

    def close(self) -> None:
        """End the threads and the arena; entries stay on disk."""
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
                self._stale += isinstance(error, StaleLease)
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
        polled = 0.0
        try:
            while not self._closed:
                with suppress(queue.Empty):
                    self._inbox.get(timeout=_POLL_S if self._open else _GONE_POLL_S if self._orphans else None)()
                for opened in list(self._open.values()):
                    self._poll(opened)
                if self._orphans and time.monotonic() - polled > _GONE_POLL_S:
                    polled = time.monotonic()
                    for orphan in [orphan for orphan in self._orphans if is_gone(orphan.holder)]:
                        self._cancel(orphan)
                        self._orphans.remove(orphan)
        except Exception:
            _log.exception("The tiers are closed, as their thread has failed; what is on disk stays.")
            self.failed = True
            self._end()
            self.arena.close()

    def _end(self) -> None:
        self._closed = True

    # Segments

    def _prepare(self, run: str, segment: int, attempt: int, holder: object, ops: Sequence[Op]) -> Lease:
        later = self._holders.get(run)
        if began_before(holder, later) and not is_gone(later):
            raise StaleLease(f"The run {run!r} was given to the process {later}, which began later.")
        self._holders[run] = holder
        # Later segments, prepared ahead, are queued before this one now, and hold what it may need.
        self._abandon(run, holder, lambda index, opened: index >= segment or opened.holder != holder)
        if attempt:  # what an earlier attempt has read will be read again
            self._act(self.planner.follow(None, segment))
        self._act(self.planner.drop(op.key for op in ops if op.writes or self._has_other_form(op)))
        at = self._table_place(len(ops))
        table = OpTable(self.arena, at, len(ops))
        table.clear()
        first, self._next_number = self._next_number, self._next_number + len(ops)
        self._open[run, segment] = _OpenSegment(ops, holder, attempt, at, table, first, table.states())
        asked = [AskedOp(first + i, op.key, slot_bytes(op.form.size), op.writes) for i, op in enumerate(ops)]
        self._act(self.planner.ask(asked))
        return Lease(str(self.arena.path), at, self.incarnation)

    def _has_other_form(self, op: Op) -> bool:
        """Whether the disk holds a tensor of another dtype or shape under the op's key."""
        entry = self.disk.files.entry(op.key)
        return entry is not None and (entry.dtype, entry.shape) != (op.form.dtype, op.form.shape)

    def _table_place(self, num_ops: int) -> int:
        """The first gap among the tables that is large enough."""
        at, size = self.arena.size_bytes - TABLES_BYTES, whole_pages(table_bytes(num_ops))
        for opened in sorted((*self._open.values(), *self._orphans), key=lambda opened: opened.table_at):
            if opened.table_at - at >= size:
                break
            at = opened.table_end
        if at + size > self.arena.size_bytes:
            raise ValueError(f"{num_ops} ops are too many for the {TABLES_BYTES} bytes of the arena's tables.")
        return at

    def _poll(self, opened: _OpenSegment) -> None:
        """Tell the planner what the segment has done since the last poll."""
        events = {NEEDED: self.planner.need, DONE: self.planner.done, SKIPPED: self.planner.cancel}
        states = opened.table.states()
        for index in np.flatnonzero(states != opened.seen).tolist():
            if event := events.get(int(states[index])):
                self._act(event(opened.first + index))
        opened.seen = states

    def _finished(self, run: str, segment: int, attempt: int, holder: object, store: str) -> _OpenSegment:
        opened = self._open.get((run, segment))
        if opened is None or (opened.attempt, opened.holder, self.incarnation) != (attempt, holder, store):
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._poll(opened)
        return opened

    def _close_segment(self, run: str, segment: int, opened: _OpenSegment) -> None:
        if self._open.get((run, segment)) is not opened:
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._cancel(opened)
        del self._open[run, segment]
        self._act(self.planner.completed(segment))

    def _abandon(self, run: str, by: object, unwanted: Callable[[int, _OpenSegment], bool]) -> None:
        """Drop open segments of a run whole. Slots that their holders may still write to are freed when they are gone.

        The last in the queue ends first, so that it gets nothing of what the others free.
        """
        for (owner, segment), opened in reversed(list(self._open.items())):
            if owner != run or not unwanted(segment, opened):
                continue
            self._act(self.planner.drop(op.key for op in opened.ops if op.writes))
            if opened.holder == by or is_gone(opened.holder):
                self._cancel(opened)
            else:
                self._cancel(opened, [number for i, number in enumerate(opened.numbers) if opened.table.place(i) == -1])
                for number in opened.numbers:
                    self._act(self.planner.disown(number))
                self._orphans.append(opened)
            del self._open[run, segment]

    def _cancel(self, opened: _OpenSegment, numbers: Sequence[int] | None = None) -> None:
        """Give up ops of a segment: the last in the queue first, so that no other of them takes its slot."""
        for number in reversed(opened.numbers if numbers is None else numbers):
            self._act(self.planner.cancel(number))

    # Instructions

    def _act(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Give(number, offset):
                    opened = self._segment_of(number)
                    opened.table.give(number - opened.first, offset)
                case Remove(key):
                    self.disk.drop(key)
                case Save(entry, number):
                    self._save(entry, self._segment_of(number), number)
                case Load(entry):
                    self._load(entry)

    def _segment_of(self, number: int) -> _OpenSegment:
        return next(opened for opened in (*self._open.values(), *self._orphans) if number in opened.numbers)

    def _save(self, entry: TierEntry, opened: _OpenSegment, number: int) -> None:
        form = opened.ops[number - opened.first].form

        def saved(future: Future[bool]) -> None:
            failure: SaveFailure | None = None
            if future.cancelled() or future.exception() is not None:
                full = not future.cancelled() and isinstance(future.exception(), DiskFull)
                failure = "full" if full else "spill_failed"
            self._act(self.planner.saved(entry, failure))

        assert entry.offset is not None
        memory = self.arena.memory(entry.offset, entry.size)
        future = opened.saves[entry.key] = self.disk.write(entry.key, memory, form.dtype, form.shape)
        self._when_done(future, "host_to_disk", saved)

    def _load(self, entry: TierEntry) -> None:
        def loaded(future: Future[Any]) -> None:
            failure: LoadFailure | None = None
            if future.cancelled() or future.exception() is not None or future.result() is None:
                failure = "lost" if self.disk.files.entry(entry.key) is None else "transient"
            self._act(self.planner.loaded(entry, failure))

        assert entry.offset is not None
        future = self.disk.read(entry.key, self.arena.memory(entry.offset, entry.size))
        self._when_done(future, "disk_to_host", loaded)

    def _when_done(self, future: Future[T], move: str, then: Callable[[Future[T]], None]) -> None:
        """Call `then` on the planner's thread when a move has ended, and count its seconds."""
        began = time.monotonic()

        def end(future: Future[T]) -> None:
            self._move_seconds[move] += time.monotonic() - began
            then(future)

        future.add_done_callback(lambda future: self._inbox.put(lambda: end(future)))

    def _statistics(self) -> dict[str, Any]:
        planner = self.planner
        entries = planner.entries.values()
        return {
            "bytes": {"host": planner.slots.used, "disk": planner.disk_used},
            "peak_bytes": {"host": planner.slots.peak, "disk": planner.disk_peak},
            "budget_bytes": dict(self._budgets),
            "entries_in": {"host": sum(entry.offset is not None for entry in entries), "disk": len(entries)},
            "on_disk_bytes": self.disk.files.bytes_resident,
            "move_seconds": dict(self._move_seconds),
            "faults": dict(self.disk.files.faults),
            "counts": planner.counts.copy(),
            "stale_leases": self._stale,
            "orphans": len(self._orphans),
        }
