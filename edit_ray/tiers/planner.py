"""Decides what the host tier and the disk tier do with a run's entries: a plain state machine.

Events are methods, instructions come back. Both know keys, bytes and offsets: no clock, no I/O, no tensor.

An *op* is one planned read or write of one entry by a segment. Ops receive slots strictly in the order in which they
were asked for, so a later op never takes what an earlier one waits for. A read waits for an earlier op that writes its
entry. A written entry is saved to disk at once, so evicting it from the host tier only frees its slot.

    op:     queued ─► loading ─► given ─► done or cancelled     (a write, or a read from the host tier, never loads)
    entry:  saving ─► in host and on disk ◄─► on disk alone     dropped from any state, and invisible from then on
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Literal, NamedTuple

from edit_ray.tiers.reuse_plan import Key, ReusePlan, Uses
from edit_ray.tiers.slots import AskedOp, Slots, TierEntry, divide, slot_bytes

DropReason = Literal["evicted", "dropped", "replaced", "lost", "spill_failed", "full"]
Outcome = Literal["useful", "late", "wasted", "unfulfilled", "cancelled"]
"""How a prefetch ends: in time; waited for; given up once loaded; nothing to load; given up before it was loaded."""
Refusal = Literal["too_large"]
LoadFailure = Literal["lost", "transient"]
SaveFailure = Literal["spill_failed", "full"]
MOST_LOADS = 8  # in flight, so that no save waits behind many of them


class Give(NamedTuple):
    """The op's slot begins at this offset. None: there is nothing to read, or no slot of this size."""

    number: int
    offset: int | None


class Load(NamedTuple):
    """Read an entry's file into its slot, then report `loaded`."""

    entry: TierEntry


class Save(NamedTuple):
    """Write to an entry's file what op `number` has put into its slot, then report `saved`."""

    entry: TierEntry
    number: int


class Remove(NamedTuple):
    """Remove the file of a key, even one that is being written."""

    key: Key


Instruction = Give | Load | Save | Remove


class TierPlanner:
    """Each event returns the instructions that follow from it, in order. Only `Load` and `Save` may take time.

    `counts` holds all counts by metric name (without `edit_ray_` and `_total`) and labels. An event about an op that
    has ended changes nothing.
    """

    def __init__(
        self, slots: Mapping[int, int], disk_bytes: int | None = None, found: Iterable[tuple[Key, int]] = ()
    ) -> None:
        """
        Args:
            slots: As for `Slots`.
            disk_bytes: Bound of the disk tier, counted in slots; None for no bound.
            found: Entries that the disk holds already, each with the size of its slot, oldest first.
        """
        self.entries: dict[Key, TierEntry] = {}
        self.slots = Slots(slots)
        self.disk_used = self.disk_peak = 0  # bytes
        self.counts: Counter[tuple[str, ...]] = Counter()
        self._disk_bytes = disk_bytes
        self._plan: Uses = {}
        self._uses: dict[Key, deque[tuple[int, int]]] = {}  # the rest of the plan
        self._queue: deque[AskedOp] = deque()
        self._ops: dict[int, AskedOp] = {}  # neither done nor cancelled
        self._writers: dict[Key, set[int]] = {}  # the ops among them that write a key
        self._num_loading = 0
        self._out: list[Instruction] = []
        for key, size in found:
            self._add(TierEntry(key, size, saved=True))

    # Events

    def follow(self, plan: Uses | None, segment: int) -> list[Instruction]:
        """A run begins or continues with a segment; None is the same plan again. Entries that the plan no longer reads
        are dropped; entries of no plan stay while there is room.
        """
        self._plan = self._plan if plan is None else plan
        self._uses = {key: deque(use for use in uses if use[0] >= segment) for key, uses in self._plan.items()}
        return self._reconsider(segment)

    def completed(self, segment: int) -> list[Instruction]:
        """A segment is complete. Entries that it was the last to read stay until the next one is: it may be retried."""
        for uses in self._uses.values():
            while uses and uses[0][0] <= segment:
                uses.popleft()
        return self._reconsider(segment)

    def ask(self, ops: Iterable[AskedOp]) -> list[Instruction]:
        """A segment's ops, in the order of use."""
        for op in ops:
            self._ops[op.number] = op
            self._queue.append(op)
            if op.writes:
                self._writers.setdefault(op.key, set()).add(op.number)
            elif not self._awaits_writer(op) and getattr(self.entries.get(op.key), "offset", None) is None:
                self._begin_prefetch(op)
        return self._serve()

    def need(self, number: int) -> list[Instruction]:
        """A segment is blocked on op `number`: its prefetch counts as late."""
        op = self._ops.get(number)
        if op is not None and op.offset is None:
            op.needed = True
        return self._serve()

    def done(self, number: int) -> list[Instruction]:
        """The segment has used what it was given."""
        op = self._ops.get(number)
        if op is None or op.offset is None:
            return self.cancel(number)
        self._end(op)
        if op.writes:
            self._publish(op, op.offset)
        elif op.entry is not None:
            if uses := self._uses.get(op.key):
                uses.popleft()
            self._end_prefetch(op, "useful")
            self._release(op.entry)
        return self._serve()

    def cancel(self, number: int) -> list[Instruction]:
        """The op is given up, whether it has its slot or not."""
        op = self._ops.get(number)
        if op is not None:
            self._end(op)
            self._end_prefetch(op, "cancelled" if op.offset is None else "wasted")
            if op.entry is not None:
                self._release(op.entry)
            else:
                self.slots.free(op.size, op.offset)
        return self._serve()

    def disown(self, number: int) -> list[Instruction]:
        """Nobody will read what this op may still write. It keeps its slot until it is cancelled."""
        if number in self._ops:
            self._forget_writer(self._ops[number])
        return self._serve()

    def loaded(self, entry: TierEntry, failure: LoadFailure | None = None) -> list[Instruction]:
        """A `Load` has ended. A lost entry is dropped; one that could not be read this time stays on disk."""
        self._num_loading -= 1
        waiting, entry.waiting = [op for op in entry.waiting or () if op.number in self._ops], None
        if failure == "lost" and not entry.gone:
            self._drop(entry, "lost")
        if failure is None:
            cause = "demand" if any(op.needed for op in waiting) else "prefetch"
            self._count_move("disk", "host", cause, entry.size)
        for op in waiting:
            if failure is None and not entry.gone:
                self._give(op, entry.offset)
            else:
                op.entry, entry.users = None, entry.users - 1
                self._give(op, None)
        if failure is not None:
            self._free_slot(entry)
        self._settle(entry)
        return self._serve()

    def saved(self, entry: TierEntry, failure: SaveFailure | None = None) -> list[Instruction]:
        """A `Save` has ended. An entry that could not be saved is dropped."""
        if failure is None:
            entry.saved = True
            self._settle(entry)
        elif not entry.gone:
            self._drop(entry, failure)
        return self._serve()

    def drop(self, keys: Iterable[Key]) -> list[Instruction]:
        """These entries are of no more use."""
        for entry in [self.entries[key] for key in dict.fromkeys(keys) if key in self.entries]:
            self._drop(entry, "dropped")
        return self._serve()

    # Ops

    def _serve(self) -> list[Instruction]:
        while self._queue and (self._queue[0].number not in self._ops or self._place(self._queue[0])):
            self._queue.popleft()
        out, self._out = self._out, []
        return out

    def _place(self, op: AskedOp) -> bool:
        """Whether the first op in the queue has its slot or is being loaded; if not it waits for a slot or a writer."""
        entry = self.entries.get(op.key)
        if op.size not in self.slots:
            self.counts["refusals", "too_large"] += 1
            self._give(op, None)
        elif op.writes:
            if (offset := self._take(op.size)) is None:
                return False
            self._give(op, offset)
        elif self._awaits_writer(op):
            return False
        elif entry is None:
            self.counts.update([("tier_lookups", "host", "miss"), ("tier_lookups", "disk", "miss")])
            self._begin_prefetch(op)
            self._give(op, None)
        elif entry.offset is None and not self._load(op, entry):
            return False
        else:
            self._use(op, entry)
        return True

    def _load(self, op: AskedOp, entry: TierEntry) -> bool:
        """Whether an entry that is on disk alone can be loaded now."""
        self._begin_prefetch(op)
        offset = self._take(entry.size) if self._num_loading < MOST_LOADS else None
        if offset is None:
            return False
        entry.offset, entry.waiting, self._num_loading = offset, [], self._num_loading + 1
        self._out.append(Load(entry))
        return True

    def _use(self, op: AskedOp, entry: TierEntry) -> None:
        op.entry, entry.users = entry, entry.users + 1
        if entry.waiting is not None:
            self.counts.update([("tier_lookups", "host", "miss"), ("tier_lookups", "disk", "hit")])
            entry.waiting.append(op)
        else:
            self.counts["tier_lookups", "host", "hit"] += 1
            self._give(op, entry.offset)

    def _give(self, op: AskedOp, offset: int | None) -> None:
        op.offset = offset
        if offset is None:
            self._end_prefetch(op, "unfulfilled")
        self._out.append(Give(op.number, offset))

    def _awaits_writer(self, op: AskedOp) -> bool:
        return any(number < op.number for number in self._writers.get(op.key, ()))

    def _end(self, op: AskedOp) -> None:
        del self._ops[op.number]
        self._forget_writer(op)

    def _forget_writer(self, op: AskedOp) -> None:
        numbers = self._writers.get(op.key, set())
        numbers.discard(op.number)
        if not numbers:
            self._writers.pop(op.key, None)

    # Entries

    def _take(self, size: int) -> int | None:
        offset, evicted = self.slots.take(size)
        if evicted:
            self._count_move("host", "disk", "eviction", size)
        return offset

    def _publish(self, op: AskedOp, offset: int) -> None:
        """Make a written entry visible, in place of the earlier one of its key."""
        if op.key in self.entries:
            self._drop(self.entries[op.key], "replaced")
        entry = TierEntry(op.key, op.size, offset)
        self._add(entry)
        self._keep_disk_bound()
        self.disk_peak = max(self.disk_peak, self.disk_used)
        if not entry.gone:
            self._out.append(Save(entry, op.number))

    def _add(self, entry: TierEntry) -> None:
        self.entries[entry.key] = entry
        self.disk_used += entry.size

    def _drop(self, entry: TierEntry, reason: DropReason) -> None:
        """Make an entry invisible. A save in flight never publishes it then, so its slot need not wait for that."""
        del self.entries[entry.key]
        entry.gone = True
        self.disk_used -= entry.size
        self.counts["entries_dropped", reason] += 1
        self._out.append(Remove(entry.key))
        self._settle(entry)

    def _release(self, entry: TierEntry) -> None:
        entry.users -= 1
        self._settle(entry)

    def _settle(self, entry: TierEntry) -> None:
        """Rank an entry that no op uses, or free its slot if it is gone."""
        if entry.evictable:
            self.slots.rank(entry, self._next_use(entry))
        elif entry.gone and not entry.users and entry.waiting is None:
            self._free_slot(entry)

    def _free_slot(self, entry: TierEntry) -> None:
        self.slots.free(entry.size, entry.offset)
        entry.offset = None

    def _next_use(self, entry: TierEntry) -> float:
        uses = self._uses.get(entry.key)
        return uses[0][1] if uses else math.inf

    def _keep_disk_bound(self) -> None:
        while self._disk_bytes is not None and self.disk_used > self._disk_bytes:
            self._drop(max(self.entries.values(), key=self._next_use), "evicted")

    def _reconsider(self, segment: int) -> list[Instruction]:
        """Drop what the plan reads in no segment from this one on, and rank the others again."""
        for entry in list(self.entries.values()):
            if self._plan.get(entry.key) and self._plan[entry.key][-1][0] < segment:
                self._drop(entry, "dropped")
        self._keep_disk_bound()
        self.slots.rank_none()
        for entry in self.entries.values():
            self._settle(entry)
        return self._serve()

    # Counts

    def _begin_prefetch(self, op: AskedOp) -> None:
        if not op.prefetch:
            op.prefetch = True
            self.counts["prefetches_requested",] += 1

    def _end_prefetch(self, op: AskedOp, outcome: Outcome) -> None:
        if op.prefetch:
            op.prefetch = False
            self.counts["prefetches", "late" if op.needed and outcome == "useful" else outcome] += 1
            self.counts["prefetch_wasted_bytes",] += op.size if outcome == "wasted" else 0

    def _count_move(self, source: str, target: str, cause: str, size: int) -> None:
        self.counts["tier_moves", source, target, cause] += 1
        self.counts["tier_moved_bytes", source, target, cause] += size


def simulate(plan: ReusePlan, host_bytes: int, disk_bytes: int | None) -> Counter[tuple[str, ...]]:
    """The planner's counts after a run by this plan, in tiers whose loads and saves take no time."""
    planner, numbers = TierPlanner(divide(host_bytes, plan.demand()), disk_bytes), count(1)
    planner.follow(plan.uses(), 0)
    for index, segment in enumerate(plan.segments):
        ops = [AskedOp(next(numbers), use.key, slot_bytes(use.size), writes) for use, writes in segment.in_order]
        _carry_out(planner, planner.ask(ops))
        for op in ops:
            _carry_out(planner, planner.done(op.number))
        planner.completed(index)
    return planner.counts


def _carry_out(planner: TierPlanner, instructions: list[Instruction]) -> None:
    waiting = deque(instructions)
    while waiting:
        match waiting.popleft():
            case Load(entry):
                waiting += planner.loaded(entry)
            case Save(entry):
                waiting += planner.saved(entry)
