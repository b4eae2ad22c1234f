"""The store of a segment that follows a reuse plan: its own latest residuals, and what the plan reads and writes."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from edit_ray.cache.stores.allocator import Extent, room_of
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.copies import Copy, Loaded, Taken, copies_for
from edit_ray.cache.stores.op_table import DONE, NEEDED, SKIPPED, WAITING, Op, OpTable
from edit_ray.cache.stores.store import Key
from edit_ray.errors import EntryLost

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


@dataclass(frozen=True)
class _Leaving:
    """What waits for a place in the arena."""

    index: int
    taken: Taken


class PlannedStore:
    """A `CacheStore` for one segment. Keys are those of a cache, (generation, expert, branch, unit, step).

    What the segment itself has just computed stays on the device, the last `history_len` of each unit. What the plan
    wants for later segments goes to the arena as well; what it wants from earlier ones comes from there, each op in
    its turn. Up to `ahead_bytes` of the device hold what is on its way: reads loaded before they are asked for, in the
    order of use, and writes that have no place in the arena yet. An entry that the plan promises and nobody has any
    more is an `EntryLost`, as another than the planned computation would make other frames.
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
        timeout_s: float = 60.0,
    ) -> None:
        """`prefix` is what the plan's keys begin with before those of the cache: the run."""
        self.arena, self.table, self.ops, self.form = arena, table, ops, form
        self.waits = Waits()
        self._prefix, self._history_len = tuple(prefix), history_len
        self._index_of: dict[tuple[Key, bool], int] = {(op.key, op.writes): i for i, op in enumerate(ops)}
        self._own: dict[Owner, OrderedDict[Key, torch.Tensor]] = {}
        self.copies = copies_for(form.device)
        self._next = 0  # the first op that has neither been used nor passed over
        self._most_ahead = ahead_bytes // max(form.size, 1)  # entries
        self._to_load = deque(i for i, op in enumerate(ops) if not op.writes)  # reads neither begun nor asked for
        self._loaded: dict[int, Loaded] = {}  # reads begun and not yet asked for
        self._leaving: deque[_Leaving] = deque()
        self._moving: deque[tuple[int, Copy]] = deque()  # ops that are over when their copy is
        self._unwritten: list[int] = []
        self._timeout_s = timeout_s
        self._go_on()

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises EntryLost where the plan wants it and the store gives it no place."""
        tensor = tensor.detach()
        own = self._own.setdefault(key[1:4], OrderedDict())
        own[key] = tensor
        while len(own) > self._history_len:
            own.popitem(last=False)
        index = self._index_of.get(((*self._prefix, *key), True))
        if index is not None:
            self.waits.writes += 1
            self._come_to(index)
            whole = tensor.reshape(self.form.shape).to(self.form.dtype).contiguous()
            self._leaving.append(_Leaving(index, self.copies.take(whole)))
        self._go_on()
        self._leave_at_most(self._most_ahead)

    def get(self, key: Key) -> torch.Tensor | None:
        """What was computed in this segment, or what the plan reads at this step; raises EntryLost."""
        own = self._own.get(key[1:4])
        if own is not None and key in own:
            return own[key]
        index = self._index_of.get(((*self._prefix, *key), False))
        if index is None:
            return None
        self.waits.reads += 1
        self._go_on()
        self._come_to(index)
        loaded = self._loaded.pop(index, None)
        if loaded is None:
            loaded = self.copies.load(self._place(index, self._await_place(index)))
        self._moving.append((index, loaded.copy))
        self._go_on()
        return self.copies.use(loaded)

    def prefetch(self, keys: Iterable[Key]) -> None:
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
        return "host" if ((*self._prefix, *key), False) in self._index_of else None

    def planned_reads(self) -> list[Key]:
        """What the plan reads, under the cache's keys, in the order of use."""
        return [op.key[len(self._prefix) :] for op in self.ops if not op.writes]

    def finish(self) -> None:
        """The segment is made: wait for copies under way, and pass over what was not used.

        Raises:
            EntryLost: the plan had it written, and it was not computed.
        """
        self._leave_at_most(0)
        self._come_to(len(self.ops))
        for _, copy in self._moving:
            copy.wait()
        self._go_on()
        if self._unwritten:
            key = self.ops[self._unwritten[0]].key
            raise EntryLost(f"The plan has {key} written in this segment, and it was not computed.")

    def settle(self) -> None:
        """Nothing is on its way when this returns, and nothing will be: the places may be given to others."""
        self._leaving.clear()
        self._to_load.clear()
        for copy in [*(copy for _, copy in self._moving), *(loaded.copy for loaded in self._loaded.values())]:
            copy.wait()
        self._moving.clear()
        self._loaded.clear()

    def _go_on(self) -> None:
        """Say what is over, and begin what can be begun without waiting."""
        while self._moving and self._moving[0][1].done():
            self.table.mark(self._moving.popleft()[0], DONE)
        while self._leaving and (offset := self.table.place(self._leaving[0].index)) != WAITING - 1:
            self._let_go(offset)
        while self._to_load and len(self._loaded) + len(self._leaving) < self._most_ahead:
            offset = self.table.place(self._to_load[0])
            if offset is None or offset < 0:
                break  # the others come after it
            index = self._to_load.popleft()
            self._loaded[index] = self.copies.load(self._place(index, offset))

    def _leave_at_most(self, number: int) -> None:
        """Wait for places until no more than so many writes have none."""
        while len(self._leaving) > number:
            self._await_place(self._leaving[0].index)
            self._go_on()

    def _let_go(self, offset: int | None) -> None:
        """Copy what waits longest to its place."""
        leaving = self._leaving.popleft()
        copy = self.copies.out(leaving.taken, self._place(leaving.index, offset))
        if copy.done():
            self.table.mark(leaving.index, DONE)
        else:
            self._moving.append((leaving.index, copy))

    def _place(self, index: int, offset: int | None) -> torch.Tensor:
        """The memory of an op at an offset of the arena."""
        if offset is None:
            raise EntryLost(f"The store has lost {self.ops[index].key}, which the plan wants at this step.")
        return self.arena.tensor(Extent(offset, room_of(self.form.size)), self.form.dtype, self.form.shape)

    def _come_to(self, index: int) -> None:
        """Pass over the ops before one that were not used; the plan lists all in the order of use."""
        if index < self._next:
            raise EntryLost(f"The plan has {self.ops[min(index, len(self.ops) - 1)].key} used once, and earlier.")
        for passed in range(self._next, index):
            self.table.mark(passed, SKIPPED)
            if self.ops[passed].writes:
                self._unwritten.append(passed)
            elif loaded := self._loaded.pop(passed, None):
                loaded.copy.wait()  # the place is another's from now on
        self._next = index + 1
        while self._to_load and self._to_load[0] <= index:
            self._to_load.popleft()

    def _await_place(self, index: int) -> int | None:
        offset = self.table.place(index)
        if offset is None or offset >= 0:
            return offset
        started = looked = time.perf_counter()
        self.table.mark(index, NEEDED)
        while (offset := self.table.place(index)) is not None and offset < 0:
            self._go_on()  # what is waited for may need the room of what is over
            now = time.perf_counter()
            if now - looked > _LOOK_S:
                looked = now
                if now - started > self._timeout_s or not self.arena.owner_lives():
                    raise EntryLost(f"The store did not bring {self.ops[index].key} in {now - started:.1f} s.")
            time.sleep(_POLL_S)
        self.waits.seconds += time.perf_counter() - started
        self.waits.calls += 1
        return offset
