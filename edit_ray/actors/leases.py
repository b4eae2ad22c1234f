"""How the GPU actor gets at what its segments reuse: two calls a segment to the CacheStore actor, none in the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edit_ray.actors.messages import RunSpec
from edit_ray.cache.stores.arena import Arena, owner_lives
from edit_ray.cache.stores.carried import Bytes, CarriedTable, carried_memory
from edit_ray.cache.stores.holders import this_holder
from edit_ray.cache.stores.op_table import OpTable
from edit_ray.cache.stores.open_segment import Lease
from edit_ray.cache.stores.planned import PlannedStore
from edit_ray.engine.reuse import Reuse
from edit_ray.errors import ConfigError, EntryLost, StaleLease

T = TypeVar("T")
logger = logging.getLogger(__name__)
Reply = Callable[[], Any]
"""Waits for the answer to a call, and raises what the call has raised."""


class Store(Protocol):
    """The CacheStore actor as the GPU actor calls it."""

    def call(self, method: str, *arguments: Any) -> Reply: ...


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
        self._holder = this_holder()
        self._directory = Path(options.directory) if options.directory else spec.root / ".cache_store"
        self._arena: Arena | None = None
        self._store_of_segment: PlannedStore | None = None
        self._given_by = ""  # the incarnation of the store that gave the last lease
        self._ahead: dict[int, Reply] = {}

    def lost(self, segment: int, attempt: int) -> list[int]:
        """The segments that have to be made again, as the store has lost what this one reads of them."""
        if attempt == 0 and segment in self._ahead:
            return []  # if something is lost, the first attempt will find out
        reads = [op.key for op in self.reuse.ops(segment) if not op.writes]
        missing = self._told(segment, lambda: self._store.call("missing", self._spec.run_id, reads)()) if reads else []
        return sorted({int(key[1]) for key in missing})

    def begin(self, segment: int, attempt: int, history_len: int, then_next: bool = True) -> PlannedStore:
        """The store for a segment; the next segment's is asked for, unless that is not what comes next."""
        self._settle()  # before the store takes the places of a segment that has failed
        lease: Lease | None = self._asked_ahead(segment) if attempt == 0 else None
        if lease is None:
            lease = self._told(segment, lambda: self._prepare(segment, attempt)())
        self._given_by = lease.store
        self._ahead.clear()
        following = segment + 1
        if then_next and following < len(self.reuse.plan.segments):
            self._ahead[following] = self._prepare(following, 0)
        arena, table = self._mapped(lease) if lease.arena else self._carried(segment, attempt)
        ahead = self._spec.config.store.device_bytes if self._on_gpu and lease.arena else 0
        store = self._store_of_segment = PlannedStore(
            arena,
            table,
            self.reuse.ops(segment),
            self.reuse.form,
            prefix=(self._spec.run_id,),
            history_len=history_len,
            ahead_bytes=ahead,
        )
        if isinstance(table, CarriedTable):
            table.waits = store.waits
        return store

    def complete(self, segment: int, attempt: int) -> dict[str, Any]:
        """What the segment has written is safe, and others may read it; returns the store's statistics."""
        statistics: dict[str, Any] = self._store.call("complete", *self._which(segment, attempt))()
        return statistics

    def give_up(self) -> None:
        """Nothing stays of what is not complete."""
        self._settle()
        with suppress(ConnectionError):  # it holds nothing then
            self._store.call("give_up", self._spec.run_id, self._holder)()

    def close(self) -> None:
        """Give up what is not complete, and unmap the arena."""
        self.give_up()
        self._unmap()

    def _unmap(self) -> None:
        if self._arena is not None:
            self._arena.close()
        self._arena = None

    @property
    def _on_gpu(self) -> bool:
        return self.reuse.form.device.type == "cuda"

    def _settle(self) -> None:
        if self._store_of_segment is not None:
            self._store_of_segment.settle()
        self._store_of_segment = None

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
                raise EntryLost(f"The store did not answer: {gone}") from None

        def fetch(index: int, skipped: list[int]) -> Bytes | None:
            data: Bytes | None = call("fetch", index, skipped)
            return data

        def keep(index: int, data: Bytes, skipped: list[int]) -> None:
            call("keep", index, data, skipped)

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
        lives: bool = self._store.call("incarnation", self._spec.run_id)() == lease.store
        return lives

    def follow(self, segment: int) -> None:
        """Tell the store that the run goes on with this segment."""
        spec, uses = self._spec, self.reuse.plan.uses()
        self._store.call("follow", spec.run_id, uses, segment, spec.config.store, self._directory, spec.root)()

    def _told(self, segment: int, ask: Callable[[], T]) -> T:
        """What is asked of the store, which is told of the run if it does not know it."""
        try:
            return ask()
        except StaleLease:
            self.follow(segment)
            return ask()

    def _prepare(self, segment: int, attempt: int) -> Reply:
        form = self.reuse.form
        ops = self.reuse.ops(segment)
        return self._store.call(
            "prepare", self._spec.run_id, segment, attempt, self._holder, ops, form.dtype, form.shape
        )

    def _which(self, segment: int, attempt: int) -> tuple[str, int, int, str, str]:
        """What the store knows a segment by that it has handed out."""
        return self._spec.run_id, segment, attempt, self._holder, self._given_by
