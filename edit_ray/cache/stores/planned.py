"""The store of a segment that follows a reuse plan: its own latest residuals, and what the plan reads and writes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from edit_ray.cache.stores.allocator import Extent, room_of
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.op_table import DONE, NEEDED, SKIPPED, Op, OpTable
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
class _Copy:
    """Bytes on their way between the device and the arena: the op is done when the event has come."""

    index: int
    event: torch.cuda.Event


class PlannedStore:
    """A `CacheStore` for one segment. Keys are those of a cache, (generation, expert, branch, unit, step).

    What the segment itself has just computed stays on the device, the last `history_len` of each unit. What the plan
    wants for later segments goes to the arena as well; what it wants from earlier ones comes from there, each op in
    its turn. An entry that the plan promises and nobody has any more is an `EntryLost`, as another than the planned
    computation would make other frames.
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
        timeout_s: float = 60.0,
    ) -> None:
        """`prefix` is what the plan's keys begin with before those of the cache: the run."""
        self.arena, self.table, self.ops, self.form = arena, table, ops, form
        self.waits = Waits()
        self._prefix, self._history_len = tuple(prefix), history_len
        self._index_of: dict[tuple[Key, bool], int] = {(op.key, op.writes): i for i, op in enumerate(ops)}
        self._own: dict[Owner, OrderedDict[Key, torch.Tensor]] = {}
        self._copies: list[_Copy] = []
        self._unwritten: list[int] = []
        self._timeout_s = timeout_s

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
            view = self._view(index)
            view.copy_(tensor.reshape(view.shape), non_blocking=True)
            self._finish(index)

    def get(self, key: Key) -> torch.Tensor | None:
        """What was computed in this segment, or what the plan reads at this step; raises EntryLost."""
        own = self._own.get(key[1:4])
        if own is not None and key in own:
            return own[key]
        index = self._index_of.get(((*self._prefix, *key), False))
        if index is None:
            return None
        self.waits.reads += 1
        tensor = self._view(index).to(self.form.device, copy=True, non_blocking=True)
        self._finish(index)
        return tensor

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
        for copy in self._copies:
            copy.event.synchronize()
        self._mark_copied()
        self._pass_over(len(self.ops))
        if self._unwritten:
            key = self.ops[self._unwritten[0]].key
            raise EntryLost(f"The plan has {key} written in this segment, and it was not computed.")

    def _view(self, index: int) -> torch.Tensor:
        """The memory of an op, waited for; ops before it that were not used are passed over."""
        self._mark_copied()
        self._pass_over(index)
        offset = self._await_place(index)
        if offset is None:
            raise EntryLost(f"The store has lost {self.ops[index].key}, which the plan wants at this step.")
        return self.arena.tensor(Extent(offset, room_of(self.form.size)), self.form.dtype, self.form.shape)

    def _pass_over(self, before: int) -> None:
        for index in self.table.untouched(before):
            self.table.mark(index, SKIPPED)
            if self.ops[index].writes:
                self._unwritten.append(index)

    def _await_place(self, index: int) -> int | None:
        offset = self.table.place(index)
        if offset is None or offset >= 0:
            return offset
        started = looked = time.perf_counter()
        self.table.mark(index, NEEDED)
        while (offset := self.table.place(index)) is not None and offset < 0:
            self._mark_copied()  # what is waited for may need the room of those
            now = time.perf_counter()
            if now - looked > _LOOK_S:
                looked = now
                if now - started > self._timeout_s or not self.arena.owner_lives():
                    raise EntryLost(f"The store did not bring {self.ops[index].key} in {now - started:.1f} s.")
            time.sleep(_POLL_S)
        self.waits.seconds += time.perf_counter() - started
        self.waits.calls += 1
        return offset

    def _finish(self, index: int) -> None:
        if self.form.device.type == "cpu":
            self.table.mark(index, DONE)
            return
        event = torch.cuda.Event()
        event.record()
        self._copies.append(_Copy(index, event))

    def _mark_copied(self) -> None:
        while self._copies and self._copies[0].event.query():
            self.table.mark(self._copies.pop(0).index, DONE)
