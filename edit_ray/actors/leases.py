"""How the GPU actor gets at what its segments reuse: two calls a segment to the CacheStore actor, none in the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.cache.stores.arena import Arena, owner_lives
from edit_ray.cache.stores.carried import Bytes, CarriedTable, carried_memory
from edit_ray.cache.stores.device_pool import DevicePool
from edit_ray.cache.stores.holders import this_holder
from edit_ray.cache.stores.op_table import OpTable
from edit_ray.cache.stores.open_segment import Lease
from edit_ray.cache.stores.planned import PlannedStore
from edit_ray.cache.stores.store import Key
from edit_ray.engine.reuse import Reuse
from edit_ray.errors import ConfigError, StaleLease, StoreDied

T = TypeVar("T")
ON_THEIR_WAY = 4  # entries
logger = logging.getLogger(__name__)
Reply = Callable[[], Any]
"""Waits for the answer to a call, and raises what the call has raised."""


class Store(Protocol):
    """The CacheStore actor as the GPU actor calls it."""

    def call(self, method: str, *arguments: Any) -> Reply: ...


@dataclass(frozen=True)
class _Opened:
    segment: int
    lease: Lease
    store: PlannedStore


class SegmentLeases:
    """One run's leases. The next segment's is asked for while this one is made, so that the store brings ahead what
    that one reads. A store that has died meanwhile is told of the run anew.

    Where the store has no shared memory, each op of the loop is a call that carries its bytes (`carried`).
    """

    def __init__(self, store: Store, spec: RunSpec, reuse: Reuse) -> None:
        """Raises ConfigError where one residual is more than the host tier."""
        options = spec.config.store
        if any(segment.working for segment in reuse.plan.segments) and reuse.form.size > options.host_bytes:
            raise ConfigError(
                [f"store.host_bytes is {options.host_bytes}; one residual of this run has {reuse.form.size} bytes."]
            )
        self._store, self._spec, self.reuse = store, spec, reuse
        # On the CPU what is read is copied when it is read: ahead of that it would only take memory.
        self.ahead_bytes = options.device_bytes if self._on_gpu else 0
        self._run_id = spec.residuals_id
        self._followed = False  # whether the store was told of the run by this object
        self._holder = this_holder()
        self._timeout_s = spec.config.engine.step_timeout_s  # for the store to give an op its place
        self._directory = spec.residuals_directory
        self._arena: Arena | None = None
        self._pool: DevicePool | None = None
        self._current: _Opened | None = None
        self._opened: _Opened | None = None  # the next segment's, ahead of its time
        self._given_by = ""  # the incarnation of the store that gave the last lease
        self._ahead: dict[int, Reply] = {}

    def lost(self, segment: int, attempt: int) -> list[int]:
        """The segments that have to be made again, as the store has lost what this one reads of them."""
        if attempt == 0 and segment in self._ahead:
            return []  # if something is lost, the first attempt will find out
        reads = [op.key for op in self.reuse.ops(segment) if not op.writes]
        missing = self._told(segment, lambda: self._store.call("missing", self._run_id, reads)()) if reads else []
        return sorted({int(key[1]) for key in missing})

    def begin(self, segment: int, attempt: int, history_len: int, then_next: bool = True) -> PlannedStore:
        """The store for a segment; the next segment's is asked for, unless that is not what comes next."""
        last, opened, self._opened = self._current, self._opened, None
        if last is not None:  # before the store takes the places of a segment that has failed
            last.store.settle()
            if last.segment != segment - 1 or attempt:
                last.store.close()
        if opened is not None and (opened.segment != segment or attempt or not self._lives(opened.lease)):
            opened.store.close()
            opened = None
        lease = None if opened is None else opened.lease
        if lease is None and attempt == 0:
            lease = self._asked_ahead(segment)
        if lease is None:
            lease = self._told(segment, lambda: self._prepare(segment, attempt)())
        self._given_by = lease.store
        self._ahead.clear()
        if then_next and segment + 1 < len(self.reuse.plan.segments):
            self._ahead[segment + 1] = self._prepare(segment + 1, 0)
        self._current = opened or self._open(segment, attempt, lease, history_len)
        if last is not None:
            self._current.store.adopt(last.store.handed_over)
            last.store.close()
        return self._current.store

    def _open(self, segment: int, attempt: int, lease: Lease, history_len: int) -> _Opened:
        """A segment's store. On a GPU, once the segment has read all, it brings ahead what the next one reads."""
        arena, table = self._mapped(lease) if lease.arena else self._carried(segment, attempt)
        if lease.arena and self.ahead_bytes and self._pool is None:
            self._take_pool()
        ahead = self.ahead_bytes if lease.arena else 0
        store = PlannedStore(
            arena,
            table,
            self.reuse.ops(segment),
            self.reuse.form,
            prefix=(self._run_id,),
            history_len=history_len,
            ahead_bytes=ahead,
            pool=self._pool if ahead else None,
            hand_over=self._handed(segment, ahead),
            handed=self._handed(segment - 1, ahead) if attempt == 0 else (),
            when_read=(lambda: self._look_ahead(segment + 1, history_len)) if ahead else None,
            timeout_s=self._timeout_s,
        )
        if isinstance(table, CarriedTable):
            table.waits = store.waits
        return _Opened(segment, lease, store)

    def _take_pool(self) -> None:
        """Once for all segments, so that what the device holds is the same after each: as many places as may be used at
        a time, which no more than a segment reads will be.
        """
        form, reads = self.reuse.form, max(len(segment.reads) for segment in self.reuse.plan.segments)
        number = min(self.ahead_bytes // max(form.size, 1), reads)
        try:
            self._pool = DevicePool(form.device, form.dtype, form.shape, number)
        except torch.OutOfMemoryError:
            self.ahead_bytes = 0
            logger.warning("The GPU lacks the %d bytes of store.device_bytes: nothing comes ahead.", number * form.size)

    def _handed(self, segment: int, ahead_bytes: int) -> list[Key]:
        """What a segment writes and the next one reads, as far as it stays on the device.

        The last in the order of use: of what has just been written the host keeps the first, and the others would have
        to come back from the disk. Some room is left for the first, so that they are on their way before they are read.
        """
        if segment < 0 or segment + 1 >= len(self.reuse.plan.segments):
            return []
        written = {op.key for op in self.reuse.ops(segment) if op.writes}
        read = dict.fromkeys(op.key for op in self.reuse.ops(segment + 1) if not op.writes)
        wanted, room = [key for key in read if key in written], ahead_bytes // max(self.reuse.form.size, 1)
        stay = room if len(wanted) <= room else room - min(ON_THEIR_WAY, room // 2)
        return wanted[len(wanted) - min(stay, len(wanted)) :]

    def _look_ahead(self, segment: int, history_len: int) -> None:
        """Load what a segment reads while the one before it is made. The answer to `prepare` came long ago."""
        if self._opened is None:
            lease = self._asked_ahead(segment)
            if lease is not None and self._arena is not None and lease.arena == str(self._arena.path):
                self._opened = self._open(segment, 0, lease, history_len)
        elif self._opened.segment == segment:
            self._opened.store.go_on()

    def complete(self, segment: int, attempt: int) -> dict[str, Any]:
        """What the segment has written is safe, and others may read it; returns the store's statistics."""
        statistics: dict[str, Any] = self._store.call("complete", *self._which(segment, attempt))()
        return statistics

    def give_up(self) -> None:
        """Nothing stays of what is not complete."""
        self._close_stores()
        with suppress(ConnectionError):  # it holds nothing then
            self._store.call("give_up", self._run_id, self._holder)()

    def make_room(self) -> None:
        """What is on the device for later segments leaves it, and nothing comes there ahead of its use again."""
        if self._pool is not None:
            self._pool.let_go()
        self._close_stores()
        self.ahead_bytes, self._pool = 0, None

    def close(self) -> None:
        """Give up what is not complete, unmap the arena, and let the device's memory go."""
        self.give_up()
        self._unmap()
        self._pool = None

    def _unmap(self) -> None:
        if self._arena is not None:
            self._arena.close()
        self._arena = None

    @property
    def _on_gpu(self) -> bool:
        return self.reuse.form.device.type == "cuda"

    def _close_stores(self) -> None:
        for opened in (self._current, self._opened):
            if opened is not None:
                opened.store.close()
        self._current = self._opened = None

    def _mapped(self, lease: Lease) -> tuple[Arena, OpTable]:
        """The store's own memory, of which this process sees the same file."""
        if self._arena is None or str(self._arena.path) != lease.arena:
            self._unmap()
            self._arena = Arena.open(lease.arena)
            if self._on_gpu and not self._arena.register():
                logger.warning("CUDA does not register the arena of %d bytes: copies wait.", self._arena.size_bytes)
        return self._arena, OpTable(self._arena.memory(lease.table), lease.num_ops)

    def _carried(self, segment: int, attempt: int) -> tuple[Arena, OpTable]:
        """A little memory of this process, for bytes that calls carry."""
        which = self._which(segment, attempt)

        def call(method: str, *arguments: Any) -> Any:
            try:
                return self._store.call(method, *which, *arguments)()
            except ConnectionError as gone:
                raise StoreDied(f"The store did not answer: {gone}") from None

        def fetch(index: int, skipped: list[int]) -> Bytes | None:
            data: Bytes | None = call("fetch", index, skipped, self._timeout_s)
            return data

        def keep(index: int, data: Bytes, skipped: list[int]) -> None:
            call("keep", index, data, skipped, self._timeout_s)

        memory = carried_memory(self.reuse.form.size)
        return memory, CarriedTable(self.reuse.ops(segment), memory, fetch, keep)

    def _asked_ahead(self, segment: int) -> Lease | None:
        """The lease that was asked for while the segment before was made, if the store that gave it still lives."""
        reply = self._ahead.pop(segment, None)
        try:
            lease: Lease | None = None if reply is None else reply()
            return lease if lease is not None and self._lives(lease) else None
        except (StaleLease, ConnectionError):
            return None

    def _lives(self, lease: Lease) -> bool:
        if lease.arena:
            return owner_lives(lease.arena)
        lives: bool = self._store.call("incarnation", self._run_id)() == lease.store
        return lives

    def follow(self, segment: int) -> None:
        """Tell the store that the run goes on with this segment."""
        spec, uses = self._spec, self.reuse.plan.uses()
        self._store.call("follow", self._run_id, uses, segment, spec.config.store, self._directory, spec.root)()
        self._followed = True

    def _told(self, segment: int, ask: Callable[[], T]) -> T:
        """What is asked of the store. One that does not know the run is told of it, and so is one that knows it from an
        earlier holder: what that one has read will be read again.
        """
        if self._followed:
            with suppress(StaleLease):
                return ask()
        self.follow(segment)
        return ask()

    def _prepare(self, segment: int, attempt: int) -> Reply:
        form = self.reuse.form
        ops = self.reuse.ops(segment)
        return self._store.call("prepare", self._run_id, segment, attempt, self._holder, ops, form.dtype, form.shape)

    def _which(self, segment: int, attempt: int) -> tuple[str, int, int, str, str]:
        """What the store knows a segment by that it has handed out."""
        return self._run_id, segment, attempt, self._holder, self._given_by


def reuse_statistics(store: PlannedStore, tiers: dict[str, Any]) -> dict[str, float]:
    """What the segment reused, what it waited for, and what the tiers hold after it."""
    prefetch = tiers["counters"].prefetch
    return {
        "entries_read": store.waits.reads,
        "entries_written": store.waits.writes,
        "reuse_read_bytes": store.waits.reads * store.form.size,
        "reuse_written_bytes": store.waits.writes * store.form.size,
        "reuse_wait_s": store.waits.seconds,
        "host_bytes": tiers["bytes"]["host"],
        "disk_bytes": tiers["on_disk_bytes"],
        "stale_leases": tiers["stale_leases"],
        **{
            f"prefetch_{outcome}": getattr(prefetch, outcome)
            for outcome in ("requested", "useful", "late", "wasted", "unfulfilled", "cancelled")
        },
    }
