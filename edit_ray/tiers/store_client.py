"""The store of one segment that follows a reuse plan: its own latest residuals, and the plan's reads and writes."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from edit_ray.errors import EntryLost, StoreDied
from edit_ray.tiers.arena import Arena, owner_lives
from edit_ray.tiers.protocol import DONE, NEEDED, SKIPPED, WAITING, Op, OpTable
from edit_ray.tiers.reuse_plan import Key
from edit_ray.tiers.transfers import Copy, DevicePool, Loaded, Taken, copies_for

_POLL_S, _LIVES_S = 0.0002, 0.05  # between polls of a place, and of whether the store lives
_CPU = torch.device("cpu")


@dataclass
class Waits:
    """The entries that `get` and `put` have moved, and how long they waited for the store."""

    seconds: float = 0.0
    reads: int = 0
    writes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


class PlannedStore:
    """A `CacheStore` for one segment. Keys are those of a cache, (generation, expert, branch, unit, step).

    The segment's own residuals stay on the device, the last `history_len` of each unit. Planned writes are also copied
    to the arena, and planned reads from there, each op in its turn. Reads are loaded to the device ahead of their use,
    in that order, up to `ahead_bytes`; as many bytes of writes may wait there for a place in the arena. Loads, and
    entries that stay for the next segment, take tensors of `pool` while it has any. A planned entry that is lost raises
    EntryLost: computing it another way would make other frames.
    """

    tier = "device"

    def __init__(
        self,
        arena: Arena,
        table: int,
        ops: Sequence[Op],
        *,
        prefix: Key = (),
        history_len: int = 1,
        ahead_bytes: int = 0,
        pool: DevicePool | None = None,
        hand_over: Collection[Key] = (),
        handed: Collection[Key] = (),
        when_read: Callable[[], None] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """
        Args:
            arena: The store's memory, as this process maps it.
            table: Offset of the segment's table of ops in the arena.
            ops: In the order of use.
            prefix: The start of the plan's keys before those of the cache: the run.
            history_len: The number of own residuals that the segment reads of each unit.
            ahead_bytes: Of the device.
            pool: Device memory that the run has allocated.
            hand_over: Writes that stay on the device for the next segment, in `handed_over`.
            handed: Reads that this segment will `adopt` so.
            when_read: Called at every `put` once all reads have begun.
            timeout_s: How long the store may take for an op that the segment waits for.
        """
        self.arena, self.table, self.ops = arena, OpTable(arena, table, len(ops)), ops
        self.waits = Waits()
        self.copies = pool.copies if pool else copies_for(ops[0].form.device if ops else _CPU)
        self.handed_over: dict[Key, Loaded] = {}
        self._prefix, self._history_len = tuple(prefix), history_len
        self._indices: dict[tuple[Key, bool], deque[int]] = {}  # of the ops to come; a read may be planned twice
        for index, op in enumerate(ops):
            self._indices.setdefault((op.key, op.writes), deque()).append(index)
        self._own: dict[Key, OrderedDict[Key, torch.Tensor]] = {}  # by expert, branch and unit
        self._next = 0  # the first op that is neither used nor passed over
        self._most_ahead = ahead_bytes // max(1, *(op.form.size for op in ops), 1)  # entries
        self._pool, self._hand_over, self._when_read = pool, frozenset(hand_over), when_read
        self._most_loaded = self._most_ahead - len(handed)
        self._to_load = deque(i for i, op in enumerate(ops) if not op.writes and op.key not in handed)
        self._loaded: dict[int, Loaded] = {}  # reads begun and not yet asked for
        self._to_write: deque[tuple[int, Taken]] = deque()  # ops that wait for a place in the arena
        self._in_flight: deque[tuple[int, Copy]] = deque()  # ops that are done when their copy is
        self._unwritten: list[int] = []
        self._timeout_s = timeout_s
        self.poll()

    def adopt(self, handed_over: dict[Key, Loaded]) -> None:
        """Take the reads that the previous segment has left on the device; their places in the arena are freed."""
        for key in [key for key in handed_over if self._indices.get((key, False))]:
            loaded, indices = handed_over.pop(key), self._indices[key, False]
            loaded.readers = len(indices)
            for index in indices:
                self._loaded[index] = loaded
                self.table.mark(index, SKIPPED)
        self._most_loaded = self._most_ahead  # including what was reserved for them

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises EntryLost where the plan wants it and the store gives it no place."""
        tensor = tensor.detach()
        index = self._reach(key, writes=True)
        if index is not None:
            op = self.ops[index]
            whole = tensor.reshape(op.form.shape).to(op.form.dtype).contiguous()
            self._to_write.append((index, self.copies.take(whole)))
            self._write()
            self.waits.writes += 1
            self.waits.written_bytes += op.form.size
            if op.key in self._hand_over:
                self.handed_over[op.key] = Loaded(whole, pooled=self._spare(op) is not None)
        own = self._own.setdefault(key[1:4], OrderedDict())
        own[key] = tensor
        while len(own) > self._history_len:
            own.popitem(last=False)
        self.poll()
        self._wait_until_waiting(self._most_ahead)
        # Not in `get`: between reads, which nothing is computed for, the device has little to do meanwhile.
        if self._when_read is not None and not self._to_load and not self._loaded:
            self._when_read()

    def get(self, key: Key) -> torch.Tensor | None:
        """A residual of this segment, or a planned read of this step. Raises EntryLost."""
        own = self._own.get(key[1:4])
        if own is not None and key in own:
            return own[key]
        self.poll()
        index = self._reach(key, writes=False)
        if index is None:
            return None
        if index not in self._loaded:
            self._load(index, self._await_place(index))
        loaded = self._loaded.pop(index)
        self.waits.reads += 1
        self.waits.read_bytes += self.ops[index].form.size
        self._pass_on(self.ops[index], loaded)
        self.poll()
        return self.copies.use(loaded)

    def prefetch(self, keys: Key | Iterable[Key]) -> None:
        """Do nothing: the store knows the plan."""

    def drop(self, key: Key) -> None:
        """Drop a residual of this segment; planned entries are the store's."""
        self._own.get(key[1:4], OrderedDict()).pop(key, None)

    def clear(self) -> None:
        self._own.clear()

    def tier_of(self, key: Key) -> str | None:
        """The tier that `get` would read from: "device", "host", or None if no read is planned. Reads nothing."""
        if key in self._own.get(key[1:4], ()):
            return "device"
        return "host" if ((*self._prefix, *key), False) in self._indices else None

    def planned_reads(self) -> list[Key]:
        """The planned reads, under the cache's keys, in the order of use."""
        return [op.key[len(self._prefix) :] for op in self.ops if not op.writes]

    def planned_writes(self) -> list[Key]:
        """As `planned_reads`, of the writes."""
        return [op.key[len(self._prefix) :] for op in self.ops if op.writes]

    def finish(self) -> None:
        """The segment is made: wait for copies in flight, and pass over unused ops.

        Raises:
            EntryLost: a planned write was not computed.
        """
        self._wait_until_waiting(0)
        self._pass_over(len(self.ops))
        for _, copy in self._in_flight:
            copy.wait()
        self.poll()
        if self._unwritten:
            key = self.ops[self._unwritten[0]].key
            raise EntryLost(f"The plan has {key} written in this segment, and it was not computed.")

    def settle(self) -> None:
        """Nothing is in flight when this returns, and nothing will be: others may be given the places."""
        self._to_write.clear()
        self._to_load.clear()
        self._when_read = None
        for _, copy in self._in_flight:
            copy.wait()
        self._in_flight.clear()
        for index in list(self._loaded):
            self._pass_on(self.ops[index], self._loaded.pop(index))

    def close(self) -> None:
        """As `settle`; also release what no segment has adopted, so that nothing of this one is left in the pool."""
        self.settle()
        for op in self.ops:
            if op.writes and op.key in self.handed_over:
                self._pass_on(op, self.handed_over.pop(op.key))
        self._pool = None

    def poll(self) -> None:
        """Report ended copies, and begin those that need not wait."""
        while self._in_flight and self._in_flight[0][1].done():
            self.table.mark(self._in_flight.popleft()[0], DONE)
        self._write()
        while self._to_load and len(self._loaded) < self._most_loaded:
            offset = self.table.place(self._to_load[0])
            if offset is None or offset < 0:
                break  # the others come after it
            self._load(self._to_load.popleft(), offset)

    def _load(self, index: int, offset: int | None) -> None:
        loaded = self._loaded[index] = self.copies.load(self._place(index, offset), self._spare(self.ops[index]))
        if loaded.copy is not None:
            self._in_flight.append((index, loaded.copy))

    def _spare(self, op: Op) -> torch.Tensor | None:
        return None if self._pool is None else self._pool.take(op.form)

    def _pass_on(self, op: Op, loaded: Loaded) -> None:
        """One of its readers has it, or never will have it."""
        loaded.readers -= 1
        if self._pool is not None and loaded.pooled and loaded.readers == 0:
            self._pool.restock(op.form)

    def _write(self) -> None:
        """Copy the writes that have a place by now."""
        while self._to_write and (offset := self.table.place(self._to_write[0][0])) != WAITING - 1:
            index, taken = self._to_write.popleft()
            self._in_flight.append((index, self.copies.out(taken, self._place(index, offset))))

    def _wait_until_waiting(self, most: int) -> None:
        """Wait until at most `most` writes are without a place."""
        while len(self._to_write) > most:
            self._await_place(self._to_write[0][0])
            self.poll()

    def _place(self, index: int, offset: int | None) -> torch.Tensor:
        """An op's slot in the arena."""
        op = self.ops[index]
        if offset is None:
            raise EntryLost(f"The store has lost {op.key}, which the plan wants at this step.")
        return self.arena.tensor(offset, op.form.dtype, op.form.shape)

    def _reach(self, key: Key, writes: bool) -> int | None:
        """The op that is used now, None if none is planned; the ops before it in the plan are passed over."""
        indices = self._indices.get(((*self._prefix, *key), writes))
        if indices is None:
            return None
        if not indices or indices[0] < self._next:
            raise EntryLost(f"The plan has {key} used earlier, and not so often.")
        index = indices.popleft()
        self._pass_over(index)
        self._next = index + 1
        while self._to_load and self._to_load[0] <= index:
            self._to_load.popleft()
        return index

    def _pass_over(self, index: int) -> None:
        """Ops before this one that were not used never will be."""
        for passed in range(self._next, index):
            if self.ops[passed].writes:
                self._unwritten.append(passed)
            loaded = self._loaded.pop(passed, None)
            if loaded is None:
                self.table.mark(passed, SKIPPED)
            else:  # the op is done when its copy is
                self._pass_on(self.ops[passed], loaded)

    def _await_place(self, index: int) -> int | None:
        offset = self.table.place(index)
        if offset is None or offset >= 0:
            return offset
        started = checked = time.perf_counter()
        self.table.mark(index, NEEDED)
        while (offset := self.table.place(index)) is not None and offset < 0:
            self.poll()  # its place may become free by what is done meanwhile
            now = time.perf_counter()
            if now - checked > _LIVES_S:
                checked = now
                if not owner_lives(self.arena.path):
                    raise StoreDied(f"The store died before it delivered {self.ops[index].key}.")
                if now - started > self._timeout_s:
                    raise EntryLost(f"The store did not deliver {self.ops[index].key} in {now - started:.1f} s.")
            time.sleep(_POLL_S)
        self.waits.seconds += time.perf_counter() - started
        return offset
