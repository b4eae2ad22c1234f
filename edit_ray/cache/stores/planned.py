"""The store of a segment that follows a reuse plan: its own latest residuals, and what the plan reads and writes."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from edit_ray.cache.stores.allocator import Extent, room_of
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.copies import Copy, Loaded, Taken, copies_for
from edit_ray.cache.stores.device_pool import DevicePool
from edit_ray.cache.stores.op_table import DONE, NEEDED, SKIPPED, WAITING, Op, OpTable
from edit_ray.cache.stores.store import Key, Keys
from edit_ray.errors import EntryLost, StoreDied

_POLL_S, _LOOK_S = 0.0002, 0.05  # between looks at a place, and at whether the store lives
Owner = tuple[str | int | None, ...]


@dataclass(frozen=True)
class Form:
    """What every residual of a run is: on which device it is computed, its dtype, its shape."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        size: int = torch.Size(self.shape).numel() * self.dtype.itemsize
        return size


@dataclass
class Waits:
    """What `get` and `put` waited for the store, in seconds and in how many calls."""

    seconds: float = 0.0
    calls: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(slots=True)
class _Leaving:
    """What waits for a place in the arena."""

    index: int
    taken: Taken


class PlannedStore:
    """A `CacheStore` for one segment. Keys are those of a cache, (generation, expert, branch, unit, step).

    What the segment itself has just computed stays on the device, the last `history_len` of each unit. What the plan
    wants for later segments goes to the arena as well; what it wants from earlier ones comes from there, each op in
    its turn. Up to `ahead_bytes` of the device hold reads before they are asked for, in the order of use, and as much
    again writes that have no place in the arena yet. Those reads, and what is handed over to the next segment, take the
    places of tensors of `pool` as far as it has any. An entry that the plan promises and nobody has any more is an
    `EntryLost`, as another than the planned computation would make other frames.
    """

    tier = "device"

    def __init__(
        self,
        arena: Arena,
        table: OpTable,
        ops: Sequence[Op],
        form: Form,
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
        """`prefix` is what the plan's keys begin with before those of the cache: the run.

        What of its writes the next segment reads, `hand_over`, stays on the device for it, in `handed_over`; `handed`
        are the reads that this one will `adopt` so. `when_read` is called again and again once all reads are in hand.
        The store has `timeout_s` for each op that the segment waits for.
        """
        self.arena, self.table, self.ops, self.form = arena, table, ops, form
        self.waits = Waits()
        self.copies, self._room = copies_for(form.device) if pool is None else pool.copies, room_of(form.size)
        self.handed_over: dict[Key, Loaded] = {}
        self._prefix, self._history_len = tuple(prefix), history_len
        self._indices_of: dict[tuple[Key, bool], deque[int]] = {}  # of the ops to come; a read may be planned twice
        for index, op in enumerate(ops):
            self._indices_of.setdefault((op.key, op.writes), deque()).append(index)
        self._own: dict[Owner, OrderedDict[Key, torch.Tensor]] = {}
        self._next = 0  # the first op that has neither been used nor passed over
        self._most_ahead = ahead_bytes // max(form.size, 1)  # entries
        self._pool, self._hand_over, self._when_read = pool, frozenset(hand_over), when_read
        self._most_loaded = self._most_ahead - len(handed)
        # Reads neither begun nor asked for; what is handed over needs no way.
        self._to_load = deque(i for i, op in enumerate(ops) if not op.writes and op.key not in handed)
        self._loaded: dict[int, Loaded] = {}  # reads begun and not yet asked for
        self._leaving: deque[_Leaving] = deque()
        self._moving: deque[tuple[int, Copy]] = deque()  # ops that are over when their copy is
        self._unwritten: list[int] = []
        self._timeout_s = timeout_s
        self.go_on()

    def adopt(self, handed_over: dict[Key, Loaded]) -> None:
        """Takes out of it the reads that the segment before has on the device already; their places are given back."""
        for key in [key for key in handed_over if self._indices_of.get((key, False))]:
            loaded, indices = handed_over.pop(key), self._indices_of[key, False]
            loaded.readers = len(indices)
            for index in indices:
                self._loaded[index] = loaded
                self.table.mark(index, SKIPPED)
        self._most_loaded = self._most_ahead  # the room that was left for them is theirs, or free

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises EntryLost where the plan wants it and the store gives it no place."""
        tensor = tensor.detach()
        index = self._come_to(key, writes=True)
        if index is not None:
            whole = tensor.reshape(self.form.shape).to(self.form.dtype).contiguous()
            self._leaving.append(_Leaving(index, self.copies.take(whole)))
            self._leave()
            self.waits.writes += 1
            if self.ops[index].key in self._hand_over:
                self.handed_over[self.ops[index].key] = Loaded(whole, pooled=self._spare() is not None)
        own = self._own.setdefault(key[1:4], OrderedDict())
        own[key] = tensor
        while len(own) > self._history_len:
            own.popitem(last=False)
        self.go_on()
        self._leave_at_most(self._most_ahead)
        # Not in `get`: between reads, which nothing is computed for, the device has little to do meanwhile.
        if self._when_read is not None and not self._to_load and not self._loaded:
            self._when_read()

    def get(self, key: Key) -> torch.Tensor | None:
        """What was computed in this segment, or what the plan reads at this step; raises EntryLost."""
        own = self._own.get(key[1:4])
        if own is not None and key in own:
            return own[key]
        self.go_on()
        index = self._come_to(key, writes=False)
        if index is None:
            return None
        if index not in self._loaded:
            self._load(index, self._await_place(index))
        loaded = self._loaded.pop(index)
        self.waits.reads += 1
        self._leave_pool(loaded)
        self.go_on()
        return self.copies.use(loaded)

    def prefetch(self, keys: Keys) -> None:
        """Nothing to do: the store knows the plan."""

    def drop(self, key: Key) -> None:
        """Of what this segment has computed; what the plan keeps is the store's."""
        self._own.get(key[1:4], OrderedDict()).pop(key, None)

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        for own in self._own.values():
            for key in [key for key in own if condition(key)]:
                del own[key]

    def clear(self) -> None:
        self._own.clear()

    def tier_of(self, key: Key) -> str | None:
        """Where an entry would be read from; reads nothing."""
        if key in self._own.get(key[1:4], ()):
            return "device"
        return "host" if ((*self._prefix, *key), False) in self._indices_of else None

    def planned_reads(self) -> list[Key]:
        """What the plan reads, under the cache's keys, in the order of use."""
        return [op.key[len(self._prefix) :] for op in self.ops if not op.writes]

    def finish(self) -> None:
        """The segment is made: wait for copies under way, and pass over what was not used.

        Raises:
            EntryLost: the plan had it written, and it was not computed.
        """
        self._leave_at_most(0)
        self._pass_over(len(self.ops))
        for _, copy in self._moving:
            copy.wait()
        self.go_on()
        if self._unwritten:
            key = self.ops[self._unwritten[0]].key
            raise EntryLost(f"The plan has {key} written in this segment, and it was not computed.")

    def settle(self) -> None:
        """Nothing is on its way when this returns, and nothing will be: the places may be given to others."""
        self._leaving.clear()
        self._to_load.clear()
        self._when_read = None
        for _, copy in self._moving:
            copy.wait()
        self._moving.clear()
        self._leave_pool_all(self._loaded)

    def close(self) -> None:
        """As `settle`, and what nobody has adopted is let go: nothing of this segment is left in the pool."""
        self.settle()
        self._leave_pool_all(self.handed_over)
        self._pool = None

    def go_on(self) -> None:
        """Say what is over, and begin what can be begun without waiting."""
        while self._moving and self._moving[0][1].done():
            self.table.mark(self._moving.popleft()[0], DONE)
        self._leave()
        while self._to_load and len(self._loaded) < self._most_loaded:
            offset = self.table.place(self._to_load[0])
            if offset is None or offset < 0:
                break  # the others come after it
            self._load(self._to_load.popleft(), offset)

    def _load(self, index: int, offset: int | None) -> None:
        place = self._place(index, offset)
        loaded = self._loaded[index] = self.copies.load(place, self._spare())
        if loaded.copy is not None:
            self._moving.append((index, loaded.copy))

    def _spare(self) -> torch.Tensor | None:
        """A tensor of the pool, whose place what comes to the device takes, or what stays there."""
        return None if self._pool is None else self._pool.take()

    def _leave_pool(self, loaded: Loaded) -> None:
        """One that reads it has it, or will not."""
        loaded.readers -= 1
        if self._pool is not None and loaded.pooled and loaded.readers == 0:
            self._pool.restock()

    def _leave_pool_all(self, unread: dict[int, Loaded] | dict[Key, Loaded]) -> None:
        while unread:
            self._leave_pool(unread.popitem()[1])

    def _leave(self) -> None:
        """Copy what waits for a place and has one now."""
        while self._leaving and (offset := self.table.place(self._leaving[0].index)) != WAITING - 1:
            leaving = self._leaving.popleft()
            copy = self.copies.out(leaving.taken, self._place(leaving.index, offset))
            self._moving.append((leaving.index, copy))

    def _leave_at_most(self, number: int) -> None:
        """Wait for places until no more than so many writes have none."""
        while len(self._leaving) > number:
            self._await_place(self._leaving[0].index)
            self.go_on()

    def _place(self, index: int, offset: int | None) -> torch.Tensor:
        """The memory of an op at an offset of the arena."""
        if offset is None:
            raise EntryLost(f"The store has lost {self.ops[index].key}, which the plan wants at this step.")
        return self.arena.tensor(Extent(offset, self._room), self.form.dtype, self.form.shape)

    def _come_to(self, key: Key, writes: bool) -> int | None:
        """The op that is used now, None if none was planned; what comes before it in the plan is passed over."""
        indices = self._indices_of.get(((*self._prefix, *key), writes))
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
        """The ops before one that were not used will not be."""
        for passed in range(self._next, index):
            if self.ops[passed].writes:
                self._unwritten.append(passed)
            loaded = self._loaded.pop(passed, None)
            if loaded is None:
                self.table.mark(passed, SKIPPED)
            else:  # the op is over when its copy is
                self._leave_pool(loaded)

    def _await_place(self, index: int) -> int | None:
        offset = self.table.place(index)
        if offset is None or offset >= 0:
            return offset
        started = looked = time.perf_counter()
        self.table.mark(index, NEEDED)
        while (offset := self.table.place(index)) is not None and offset < 0:
            self.go_on()  # what is waited for may need the room of what is over
            now = time.perf_counter()
            if now - looked > _LOOK_S:
                looked = now
                if not self.arena.owner_lives():
                    raise StoreDied(f"The store died that was to bring {self.ops[index].key}.")
                if now - started > self._timeout_s:
                    raise EntryLost(f"The store did not bring {self.ops[index].key} in {now - started:.1f} s.")
            time.sleep(_POLL_S)
        self.waits.seconds += time.perf_counter() - started
        self.waits.calls += 1
        return offset
