"""The arena and the disk tier, as the CacheStore actor serves them to the processes that make segments."""

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
from edit_ray.tiers.planner import AskedOp, Give, Instruction, Load, Remove, Save, SaveFailure, TierPlanner
from edit_ray.tiers.protocol import DONE, NEEDED, SKIPPED, Lease, Op, OpTable, began_before, is_gone, table_bytes
from edit_ray.tiers.reuse_plan import Key, Uses
from edit_ray.tiers.slots import slot_bytes, whole_pages

T = TypeVar("T")
_log = logging.getLogger(__name__)
TABLES_BYTES = 1 << 20  # of the arena, beyond the slots
_POLL_S, _GONE_POLL_S = 0.0005, 0.05  # between looks at op tables, and at whether a holder is gone


@dataclass(eq=False)
class _OpenSegment:
    """A segment that was prepared and not completed; op i has the planner's number `first` + i."""

    ops: Sequence[Op]
    holder: object
    attempt: int
    table_at: int
    table: OpTable
    first: int
    seen: NDArray[np.int64]  # the states at the last look
    open: set[int]  # ops that are neither done nor given up
    saves: dict[Key, Future[bool]] = field(default_factory=dict)

    @property
    def table_end(self) -> int:
        return self.table_at + whole_pages(table_bytes(len(self.ops)))


class TierService:
    """Gives each op of the runs' segments its slot, and makes what a segment wrote visible and durable.

    What a completed segment wrote outlives this process, as it is on disk. One thread owns the planner; any thread may
    call the public methods.

    A holder is a process that writes into the arena by itself (`protocol.this_process`). What it was given and what is
    taken back, because another holder has its segment now, stays taken until the process is gone: its last copies may
    be in flight.
    """

    def __init__(
        self,
        arena: Arena,
        slots: Mapping[int, int],
        disk: DiskTier,
        disk_bytes: int | None = None,
        *,
        is_gone: Callable[[object], bool] = is_gone,
    ) -> None:
        """Takes over arena and disk, and finds the entries on the disk.

        Args:
            arena: At least as many bytes as the slots, and `TABLES_BYTES`.
            slots: Number of slots by their size; see `slots.divide`.
            disk: The disk tier.
            disk_bytes: What it may hold, counted in slots' sizes; None for no bound.
            is_gone: Whether a holder cannot write any more.
        """
        self.arena, self.disk = arena, disk
        self.incarnation = secrets.token_hex(8)
        self.failed = False  # by an error in its thread: the arena is closed, and every call is refused
        self.planner = TierPlanner(
            slots, disk_bytes, [(key, slot_bytes(entry.nbytes)) for key, entry in disk.files.entries().items()]
        )
        self._is_gone = is_gone
        self._budgets = {"host": sum(size * number for size, number in slots.items()), "disk": disk_bytes}
        self._open: dict[tuple[str, int], _OpenSegment] = {}
        self._orphans: list[_OpenSegment] = []  # taken from holders that may still write
        self._holders: dict[str, object] = {}  # of each run, the last
        self._op_of: dict[int, tuple[_OpenSegment, int]] = {}
        self._last_number = 0
        self._stale = 0  # calls that were refused
        self._move_seconds = {"host_to_disk": 0.0, "disk_to_host": 0.0}
        # No SimpleQueue: its `get` never returns if it finds the queue empty when its time is over already.
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="tiers", daemon=True)
        self._thread.start()

    # What may be called from any thread.

    def follow(self, uses: Uses, segment: int = 0) -> None:
        """A run begins, or goes on, with a segment: when each of its entries will be read. What no segment from this
        one on reads is dropped.
        """
        self._do(lambda: self._act(self.planner.follow(uses, segment)))

    def prepare(self, run: str, segment: int, attempt: int, holder: object, ops: Sequence[Op]) -> Lease:
        """Begin to load what a segment reads, in the order of use, and to make room for what it writes. An earlier
        attempt at the same segment is dropped whole.

        Raises:
            StaleLease: a holder that began later has the run, and lives.
            ValueError: no table is left.
        """
        return self._do(lambda: self._prepare(run, segment, attempt, holder, ops))

    def complete(self, run: str, segment: int, attempt: int, holder: object, store: str = "") -> None:
        """The segment is made: what it wrote is durable when this returns, and others may read it from now on.

        `store` is the incarnation that gave the lease; "" for this one, whichever it is.

        Raises:
            StaleLease: another attempt, another holder or another store has the segment.
            OSError: something could not be saved; the segment has to be made again.
        """
        opened = self._do(lambda: self._finished(run, segment, attempt, holder, store))
        for save in opened.saves.values():
            save.result()
        self.disk.sync(list(opened.saves))
        self._do(lambda: self._close_segment(run, segment, opened))

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
        """Bytes, peaks and entries of each tier, and all counts."""
        return self._do(self._statistics)

    def check(self) -> None:
        """AssertionError unless all adds up; see `TierPlanner.check`."""
        self._do(self.planner.check)

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
        try:
            self._serve_until_closed()
        except Exception:
            _log.exception("The tiers are closed, as their thread has failed; what is on disk stays.")
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
                for orphan in [orphan for orphan in self._orphans if self._is_gone(orphan.holder)]:
                    self._orphans.remove(orphan)
                    self._cancel(orphan, list(orphan.open))

    def _end(self) -> None:
        self._closed = True

    # Segments

    def _prepare(self, run: str, segment: int, attempt: int, holder: object, ops: Sequence[Op]) -> Lease:
        later = self._holders.get(run)
        if began_before(holder, later) and not self._is_gone(later):
            raise StaleLease(f"The run {run!r} was given to the process {later}, which began later.")
        self._holders[run] = holder
        # Later ones, asked for ahead, stand in line before this one now, and hold what it may need. The last ends
        # first, so that it gets nothing of what the others give back.
        for which, opened in reversed(list(self._open.items())):
            if which[0] == run and (which[1] >= segment or opened.holder != holder):
                self._abandon(*which, by=holder)
        if attempt:  # what an earlier attempt has read will be read again
            self._act(self.planner.rewind(segment))
        self._act(self.planner.drop(op.key for op in ops if op.writes or self._has_other_form(op)))
        at = self._table_place(len(ops))
        table = OpTable(self.arena.memory(at, table_bytes(len(ops))), len(ops))
        table.clear()
        first, self._last_number = self._last_number + 1, self._last_number + len(ops)
        opened = _OpenSegment(ops, holder, attempt, at, table, first, table.states(), set(range(len(ops))))
        self._open[run, segment] = opened
        self._op_of |= {first + index: (opened, index) for index in range(len(ops))}
        asked = [AskedOp(first + i, op.key, slot_bytes(op.form.size), op.writes) for i, op in enumerate(ops)]
        self._act(self.planner.ask(asked))
        return Lease(str(self.arena.path), at, len(ops), self.incarnation)

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

    def _look(self, opened: _OpenSegment) -> None:
        """What the segment has done since the last look."""
        states = opened.table.states()
        for index in np.flatnonzero(states != opened.seen).tolist():
            number, state = opened.first + index, int(states[index])
            if index not in opened.open:
                continue
            if state == NEEDED:
                self._act(self.planner.need(number))
            elif state in (DONE, SKIPPED):
                opened.open.discard(index)
                self._act(self.planner.done(number) if state == DONE else self.planner.cancel(number))
                del self._op_of[number]
        opened.seen = states

    def _finished(self, run: str, segment: int, attempt: int, holder: object, store: str) -> _OpenSegment:
        opened = self._open.get((run, segment))
        known = None if opened is None else (opened.attempt, opened.holder, self.incarnation)
        if opened is None or known != (attempt, holder, store or self.incarnation):
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._look(opened)
        return opened

    def _close_segment(self, run: str, segment: int, opened: _OpenSegment) -> None:
        if self._open.get((run, segment)) is not opened:
            raise StaleLease(f"Segment {segment} of {run!r} was given to another, or given up.")
        self._cancel(self._open.pop((run, segment)), list(opened.open))
        self._act(self.planner.completed(segment))

    def _abandon(self, run: str, segment: int, by: object) -> None:
        """Drop an open segment whole; what its holder may still write to is taken back when it cannot any more."""
        opened = self._open.pop((run, segment))
        self._act(self.planner.drop(op.key for op in opened.ops if op.writes))
        if opened.holder == by or self._is_gone(opened.holder):
            return self._cancel(opened, list(opened.open))
        self._cancel(opened, [index for index in opened.open if opened.table.place(index) == -1])
        for index in opened.open:
            self._act(self.planner.disown(opened.first + index))
        self._orphans.append(opened)

    def _cancel(self, opened: _OpenSegment, indices: Iterable[int]) -> None:
        """Give up ops of a segment."""
        for index in sorted(indices, reverse=True):  # the last in line first, so that no other of them takes its slot
            opened.open.discard(index)
            self._act(self.planner.cancel(opened.first + index))
            del self._op_of[opened.first + index]

    def _missing(self, keys: Sequence[Key]) -> list[Key]:
        unfinished = {op.key for opened in self._open.values() for op in opened.ops if op.writes}
        return [key for key in keys if key in unfinished or key not in self.planner.entries]

    def _give_up(self, run: str, holder: object) -> None:
        for which in [which for which, opened in self._open.items() if which[0] == run and opened.holder == holder]:
            self._abandon(*which, by=holder)

    def _drop_run(self, run: str) -> None:
        self._holders.pop(run, None)
        for which in [which for which in self._open if which[0] == run]:
            self._abandon(*which, by=None)
        self._act(self.planner.drop([key for key in self.planner.entries if key and key[0] == run]))

    # Instructions

    def _act(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Give(number, offset):
                    opened, index = self._op_of[number]
                    opened.table.give(index, offset)
                case Remove(key):
                    self.disk.drop(key)
                case Save():
                    self._save(instruction)
                case Load():
                    self._load(instruction)

    def _save(self, save: Save) -> None:
        opened, index = self._op_of[save.number]
        form, began = opened.ops[index].form, time.monotonic()

        def end(future: Future[bool]) -> None:
            self._move_seconds["host_to_disk"] += time.monotonic() - began
            failure: SaveFailure | None = None
            if future.cancelled() or future.exception() is not None:
                full = not future.cancelled() and isinstance(future.exception(), DiskFull)
                failure = "full" if full else "spill_failed"
            self._act(self.planner.saved(save.ticket, failure))

        memory = self.arena.memory(save.offset, slot_bytes(form.size))
        future = opened.saves[save.key] = self.disk.write(save.key, memory, form.dtype, form.shape)
        future.add_done_callback(lambda future: self._inbox.put(lambda: end(future)))

    def _load(self, load: Load) -> None:
        began = time.monotonic()

        def end(future: Future[Any]) -> None:
            self._move_seconds["disk_to_host"] += time.monotonic() - began
            failed = future.cancelled() or future.exception() is not None or future.result() is None
            there = self.disk.files.entry(load.key) is not None
            self._act(self.planner.loaded(load.ticket, ("transient" if there else "lost") if failed else None))

        future = self.disk.read(load.key, self.arena.memory(load.offset, load.size))
        future.add_done_callback(lambda future: self._inbox.put(lambda: end(future)))

    def _statistics(self) -> dict[str, Any]:
        planner = self.planner
        entries = planner.entries.values()
        return {
            "bytes": {"host": planner.slots.used, "disk": planner.disk_used},
            "peak_bytes": {"host": planner.slots.peak, "disk": planner.disk_peak},
            "budget_bytes": dict(self._budgets),
            "entries_in": {"host": sum(entry.offset is not None for entry in entries), "disk": len(entries)},
            "entries": len(entries),
            "on_disk_bytes": self.disk.files.bytes_resident,
            "move_seconds": dict(self._move_seconds),
            "faults": dict(self.disk.files.faults),
            "counts": planner.counts.copy(),
            "open_prefetches": planner.open_prefetches,
            "stale_leases": self._stale,
            "orphans": len(self._orphans),
        }
