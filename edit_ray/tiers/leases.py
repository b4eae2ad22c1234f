"""The GPU actor's side of reuse: two calls a segment to the CacheStore actor, none in the loop."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_args

import torch

from edit_ray.errors import ConfigError, StaleLease, StoreDied
from edit_ray.tiers.arena import Arena, owner_lives
from edit_ray.tiers.options import ReusingRun
from edit_ray.tiers.planner import Outcome
from edit_ray.tiers.protocol import EntryForm, Lease, Op, this_process
from edit_ray.tiers.reuse_plan import Key, ReusePlan
from edit_ray.tiers.store_client import PlannedStore
from edit_ray.tiers.transfers import DevicePool

T = TypeVar("T")
KEPT_FREE = 4  # entries' places on the device for the first reads of a segment that adopts others
logger = logging.getLogger(__name__)
Reply = Callable[[], Any]
"""Waits for the answer to a call, or raises its error."""


class Store(Protocol):
    """The CacheStore actor as the GPU actor calls it."""

    def call(self, method: str, *arguments: Any) -> Reply: ...


@dataclass(frozen=True)
class Reuse:
    """The reuse plan of a run, and the device, dtype and shape that all its entries have."""

    plan: ReusePlan
    form: EntryForm

    def ops(self, segment: int) -> list[Op]:
        """A segment's reads and writes, in the order of use."""
        return [Op(tuple(use.key), self.form, writes) for use, writes in self.plan.segments[segment].in_order]


@dataclass(frozen=True)
class _Opened:
    segment: int
    lease: Lease
    store: PlannedStore


class SegmentLeases:
    """One run's leases. The next segment's is asked for while this one is made, so that the store loads its reads
    ahead. A new store in place of one that has died is told of the run again.
    """

    def __init__(self, store: Store, run: ReusingRun, reuse: Reuse) -> None:
        """Raises ConfigError where one entry is larger than the host tier."""
        if any(segment.working for segment in reuse.plan.segments) and reuse.form.size > run.options.host_bytes:
            raise ConfigError(
                [f"store.host_bytes is {run.options.host_bytes}; one residual of this run has {reuse.form.size} bytes."]
            )
        self._store, self._run, self.reuse = store, run, reuse
        self._on_gpu = reuse.form.device.type == "cuda"
        # On the CPU a read is copied when it is used: earlier it would only take memory.
        self.ahead_bytes = run.options.device_bytes if self._on_gpu else 0
        self._followed = False  # whether this object has told the store of the run
        self._holder = this_process()
        self._arena: Arena | None = None
        self._pool: DevicePool | None = None
        self._current: _Opened | None = None
        self._next: _Opened | None = None  # the next segment's, while the current one is made
        self._given_by = ""  # the incarnation of the store that gave the last lease
        self._asked: dict[int, Reply] = {}

    def lost(self, segment: int, attempt: int) -> list[int]:
        """The segments that must be made again, as the store has lost entries of theirs that this one reads."""
        if attempt == 0 and segment in self._asked:
            return []  # the first attempt finds out if something is lost
        reads = self._reads(segment)
        missing = (
            self._followed_call(segment, lambda: self._store.call("missing", self._run.name, reads)()) if reads else []
        )
        return sorted({int(key[1]) for key in missing})

    def begin(self, segment: int, attempt: int, history_len: int, then_next: bool = True) -> PlannedStore:
        """The store for a segment. The next segment's lease is asked for, unless another segment comes next.

        Raises StoreDied if the store has died with entries that the segment reads.
        """
        last, opened, self._next = self._current, self._next, None
        if last is not None:  # before the store gives the places of a failed segment to others
            last.store.settle()
            if last.segment != segment - 1 or attempt:
                last.store.close()
        if opened is not None and (opened.segment != segment or attempt or not owner_lives(opened.lease.arena)):
            opened.store.close()
            opened = None
        lease = None if opened is None else opened.lease
        if lease is None and attempt == 0:
            lease = self._lease_asked_for(segment)
        if lease is None:
            lease = self._lease_now(segment, attempt)
        self._given_by = lease.store
        self._asked.clear()
        if then_next and segment + 1 < len(self.reuse.plan.segments):
            self._asked[segment + 1] = self._prepare(segment + 1, 0)
        self._current = opened or self._open(segment, attempt, lease, history_len)
        if last is not None:
            self._current.store.adopt(last.store.handed_over)
            last.store.close()
        return self._current.store

    def complete(self, segment: int, attempt: int) -> dict[str, Any]:
        """Make the segment's writes durable and visible to others; returns the store's statistics."""
        which = (self._run.name, segment, attempt, self._holder, self._given_by)
        statistics: dict[str, Any] = self._store.call("complete", *which)()
        return statistics

    def follow(self, segment: int) -> None:
        """Tell the store that the run continues with this segment."""
        run, plan = self._run, self.reuse.plan
        of_plan = plan.uses(), plan.demand(), segment
        self._store.call("follow", run.name, *of_plan, run.options, run.directory, run.root)()
        self._followed = True

    def give_up(self) -> None:
        """Drop what is not complete."""
        self._close_stores()
        with suppress(ConnectionError):  # a dead store holds nothing
            self._store.call("give_up", self._run.name, self._holder)()

    def free_device(self) -> None:
        """Free the device memory of later segments; nothing is loaded ahead of its use from now on."""
        if self._pool is not None:
            self._pool.release()
        self._close_stores()
        self.ahead_bytes, self._pool = 0, None

    def close(self) -> None:
        """Drop what is not complete, unmap the arena, and free the device's memory."""
        self.give_up()
        if self._arena is not None:
            self._arena.close()
        self._arena = self._pool = None

    def _open(self, segment: int, attempt: int, lease: Lease, history_len: int) -> _Opened:
        """A segment's store. On a GPU, once the segment has begun its last read, it loads the next one's ahead."""
        arena = self._map(segment, lease)
        if self.ahead_bytes and self._pool is None:
            self._take_pool()
        store = PlannedStore(
            arena,
            lease.table,
            self.reuse.ops(segment),
            prefix=(self._run.name,),
            history_len=history_len,
            ahead_bytes=self.ahead_bytes,
            pool=self._pool,
            hand_over=self._handed(segment),
            handed=self._handed(segment - 1) if attempt == 0 else (),
            when_read=(lambda: self._load_ahead(segment + 1, history_len)) if self.ahead_bytes else None,
            timeout_s=self._run.timeout_s,
        )
        return _Opened(segment, lease, store)

    def _map(self, segment: int, lease: Lease) -> Arena:
        """The store's arena, mapped into this process. Raises StoreDied if it is gone."""
        if self._arena is None or str(self._arena.path) != lease.arena:
            if self._arena is not None:
                self._arena.close()
                self._arena = None
            try:
                self._arena = Arena.open(lease.arena)
            except (FileNotFoundError, ProcessLookupError):
                raise StoreDied(f"The store died after it gave a lease of segment {segment}.") from None
            if self._on_gpu and not self._arena.register():
                logger.warning("CUDA does not register the arena of %d bytes: copies wait.", self._arena.size_bytes)
        return self._arena

    def _take_pool(self) -> None:
        """Allocate once for all segments, so that the device holds the same after each: as many tensors as may be in
        use at a time, at most those that a segment reads.
        """
        segments = range(len(self.reuse.plan.segments))
        reads = max(([op.form for op in self.reuse.ops(k) if not op.writes] for k in segments), key=len)
        number = Counter(reads[: self.ahead_bytes // max(self.reuse.form.size, 1)])
        try:
            self._pool = DevicePool(self.reuse.form.device, number)
        except torch.OutOfMemoryError:
            self.ahead_bytes = 0
            size = sum(form.size * count for form, count in number.items())
            logger.warning("The GPU lacks the %d bytes of store.device_bytes: nothing is loaded ahead.", size)

    def _handed(self, segment: int) -> list[Key]:
        """The writes of a segment that stay on the device, as the next one reads them.

        They are the last in the order of use. The store loads in that order and does not know what stays here: so it
        loads the fewest of them in vain. Some places stay free for the first reads, which are loaded ahead: a host tier
        without room for all may have evicted them, because they were saved first.
        """
        if segment < 0 or segment + 1 >= len(self.reuse.plan.segments):
            return []
        written = {op.key for op in self.reuse.ops(segment) if op.writes}
        read = dict.fromkeys(op.key for op in self.reuse.ops(segment + 1) if not op.writes)
        wanted, places = [key for key in read if key in written], self.ahead_bytes // max(self.reuse.form.size, 1)
        stay = places if len(wanted) <= places else places - min(KEPT_FREE, places // 2)
        return wanted[len(wanted) - min(stay, len(wanted)) :]

    def _load_ahead(self, segment: int, history_len: int) -> None:
        """Load a segment's reads while the one before it is made. The answer to `prepare` came long ago."""
        if self._next is None:
            lease = self._lease_asked_for(segment)
            if lease is not None and self._arena is not None and lease.arena == str(self._arena.path):
                self._next = self._open(segment, 0, lease, history_len)
        elif self._next.segment == segment:
            self._next.store.poll()

    def _close_stores(self) -> None:
        for opened in (self._current, self._next):
            if opened is not None:
                opened.store.close()
        self._current = self._next = None

    def _lease_asked_for(self, segment: int) -> Lease | None:
        """The lease that was asked for while the previous segment was made, if the store that gave it still lives."""
        reply = self._asked.pop(segment, None)
        try:
            lease: Lease | None = None if reply is None else reply()
        except (StaleLease, ConnectionError):
            return None
        return lease if lease is not None and owner_lives(lease.arena) else None

    def _lease_now(self, segment: int, attempt: int) -> Lease:
        """Ask for the segment's lease. A new store may lack entries of the one that has died: then raise StoreDied."""
        lease: Lease
        if self._followed:
            with suppress(StaleLease):
                lease = self._prepare(segment, attempt)()
                return lease
            if self.lost(segment, max(attempt, 1)):
                raise StoreDied(f"The store died with entries that segment {segment} reads.")
        lease = self._followed_call(segment, lambda: self._prepare(segment, attempt)())
        return lease

    def _followed_call(self, segment: int, ask: Callable[[], T]) -> T:
        """Call a store that follows the run for this object: not an earlier holder's reads, nor none."""
        if self._followed:
            with suppress(StaleLease):
                return ask()
        self.follow(segment)
        return ask()

    def _reads(self, segment: int) -> list[Key]:
        """The entries that a segment reads."""
        return [op.key for op in self.reuse.ops(segment) if not op.writes]

    def _prepare(self, segment: int, attempt: int) -> Reply:
        ops = self.reuse.ops(segment)
        return self._store.call("prepare", self._run.name, segment, attempt, self._holder, ops)


def reuse_statistics(store: PlannedStore, tiers: dict[str, Any]) -> dict[str, float]:
    """What the segment has reused and waited for, and what the tiers hold after it."""
    waits, counts = store.waits, tiers["counts"]
    return {
        "entries_read": waits.reads,
        "entries_written": waits.writes,
        "reuse_read_bytes": waits.read_bytes,
        "reuse_written_bytes": waits.written_bytes,
        "reuse_wait_s": waits.seconds,
        "host_bytes": tiers["bytes"]["host"],
        "disk_bytes": tiers["bytes"]["disk"],
        "stale_leases": tiers["stale_leases"],
        "prefetch_requested": counts["prefetches_requested",],
        **{f"prefetch_{outcome}": counts["prefetches", outcome] for outcome in get_args(Outcome)},
    }
