"""What the host tier and the disk tier do with a run's entries, decided: a plain state machine.

Events are methods, instructions come back; keys, bytes and offsets alone, no clock, no I/O, no tensor.

An *op* is one planned read or write of one entry by a segment. Ops get their slots strictly in the order in which they
were asked for, so a later one never takes what an earlier one waits for. A read waits for an earlier op that writes its
entry. What was written is saved to disk at once, so to evict an entry from the host tier is to give its slot away.

    op:     queued ─► loading ─► given ─► done or cancelled     (never loading: a write, or a read from the host tier)
    entry:  saving ─► in host and on disk ◄─► on disk alone     dropped from any state, and then out of sight at once
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

from edit_ray.tiers.reuse_plan import Key, Uses
from edit_ray.tiers.slots import Slots, TierEntry

DropReason = Literal["evicted", "dropped", "replaced", "lost", "spill_failed", "full"]
Outcome = Literal["useful", "late", "wasted", "unfulfilled", "cancelled"]
"""How a prefetch ends: in time; waited for; given up after it came; nothing there; given up before it came."""
Refusal = Literal["too_large"]
LoadFailure = Literal["lost", "transient"]
SaveFailure = Literal["spill_failed", "full"]
MOST_LOADS = 8  # in flight, so that no save waits behind many of them


class AskedOp(NamedTuple):
    """One op as it is asked for. Numbers are used once, and grow; `size` is that of the slot."""

    number: int
    key: Key
    size: int
    writes: bool


class Give(NamedTuple):
    """The op's slot begins at this offset. None: nothing is there to read, or no slot has this size."""

    number: int
    offset: int | None


class Load(NamedTuple):
    """Read an entry's file into its slot, then say `loaded`."""

    ticket: int
    key: Key
    offset: int
    size: int


class Save(NamedTuple):
    """Write what op `number` has put into its slot to a file, then say `saved`."""

    ticket: int
    number: int
    key: Key
    offset: int


class Remove(NamedTuple):
    """Remove an entry's file, also one that is being written."""

    key: Key


Instruction = Give | Load | Save | Remove


@dataclass(slots=True, eq=False)
class _Op:
    asked: AskedOp
    entry: TierEntry | None = None  # that a read uses
    offset: int | None = None  # once given
    needed: bool = False  # the segment waits for it
    prefetch: bool = False  # a read that was not in the host tier, and has no outcome yet


class TierPlanner:
    """Events are methods; each returns what is to be done, in order. Only `Load` and `Save` may take their time.

    `counts` has all that was counted, by the name of a metric (without `edit_ray_` and `_total`) and its labels.
    """

    def __init__(
        self, slots: Mapping[int, int], disk_bytes: int | None = None, found: Iterable[tuple[Key, int]] = ()
    ) -> None:
        """`slots` is as for `Slots`; `disk_bytes`, None for no bound, counts what is on disk as slots. `found`
        are entries on disk from before, each with the size of its slot, the oldest first.
        """
        self.entries: dict[Key, TierEntry] = {}
        self.slots = Slots(slots)
        self.disk_used = self.disk_peak = 0  # bytes
        self.counts: Counter[tuple[str, ...]] = Counter()
        self._disk_bytes = disk_bytes
        self._plan: Uses = {}
        self._uses: dict[Key, deque[tuple[int, int]]] = {}  # what is left of the plan
        self._queue: deque[_Op] = deque()
        self._ops: dict[int, _Op] = {}  # neither done nor cancelled
        self._writers: dict[Key, set[int]] = {}  # those of them that write a key
        self._loading: dict[int, tuple[TierEntry, list[_Op]]] = {}  # by ticket, with the ops that wait
        self._saving: dict[int, TierEntry] = {}
        self._tickets = count(1)
        self._out: list[Instruction] = []
        for key, size in found:
            self._add(TierEntry(key, size, saved=True))

    # Events

    def follow(self, plan: Uses, segment: int) -> list[Instruction]:
        """A run begins, or goes on, with a segment. What its plan no longer reads is dropped; what no plan has stays
        while there is room.
        """
        self._plan = plan
        self._uses = {key: deque(use for use in uses if use[0] >= segment) for key, uses in plan.items()}
        return self._reconsider(segment)

    def rewind(self, segment: int) -> list[Instruction]:
        """The plan is followed again from a segment on."""
        return self.follow(self._plan, segment)

    def completed(self, segment: int) -> list[Instruction]:
        """A segment is made. What it was the last to read stays until the next one is made: it may be made again."""
        for uses in self._uses.values():
            while uses and uses[0][0] <= segment:
                uses.popleft()
        return self._reconsider(segment)

    def ask(self, ops: Iterable[AskedOp]) -> list[Instruction]:
        """A segment's ops, in the order of use."""
        for asked in ops:
            op = self._ops[asked.number] = _Op(asked)
            self._queue.append(op)
            if asked.writes:
                self._writers.setdefault(asked.key, set()).add(asked.number)
            elif not self._awaits_writer(asked) and getattr(self.entries.get(asked.key), "offset", None) is None:
                self._begin_prefetch(op)
        return self._serve()

    def need(self, number: int) -> list[Instruction]:
        """The segment waits for this op: it comes late."""
        op = self._known(number)
        if op is not None and op.offset is None:
            op.needed = True
        return self._serve()

    def done(self, number: int) -> list[Instruction]:
        """The segment has used what it was given."""
        op = self._ops.get(number)
        if op is None or op.offset is None:
            return self.cancel(number)
        self._end(op)
        if op.asked.writes:
            self._publish(op.asked, op.offset)
        elif op.entry is not None:
            if uses := self._uses.get(op.asked.key):
                uses.popleft()
            self._end_prefetch(op, "useful")
            op.entry.users -= 1
            self._settle(op.entry)
        return self._serve()

    def cancel(self, number: int) -> list[Instruction]:
        """The op is given up, whether it has its slot or not."""
        op = self._known(number)
        if op is not None:
            self._end(op)
            self._end_prefetch(op, "cancelled" if op.offset is None else "wasted")
            if op.entry is not None:
                op.entry.users -= 1
                self._settle(op.entry)
            elif op.offset is not None:
                self.slots.free(op.asked.size, op.offset)
        return self._serve()

    def disown(self, number: int) -> list[Instruction]:
        """Nobody reads what this op may still write. It keeps its slot until it is cancelled."""
        op = self._known(number)
        if op is not None:
            self._forget_writer(op.asked)
        return self._serve()

    def loaded(self, ticket: int, failure: LoadFailure | None = None) -> list[Instruction]:
        """A `Load` has ended. What is lost is dropped; what could not be read this time stays on disk."""
        if ticket not in self._loading:
            return self.cancel(-1)  # which is stale
        entry, waiting = self._loading.pop(ticket)
        entry.loading = False
        waiting = [op for op in waiting if op.asked.number in self._ops]
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
            self.slots.leave(entry)
        self._settle(entry)
        return self._serve()

    def saved(self, ticket: int, failure: SaveFailure | None = None) -> list[Instruction]:
        """A `Save` has ended. What could not be saved is dropped."""
        if ticket not in self._saving:
            return self.cancel(-1)  # which is stale
        entry = self._saving.pop(ticket)
        if failure is None:
            entry.saved = True
            self._settle(entry)
        elif not entry.gone:
            self._drop(entry, failure)
        return self._serve()

    def drop(self, keys: Iterable[Key]) -> list[Instruction]:
        """Nobody wants these entries any more."""
        for entry in [self.entries[key] for key in dict.fromkeys(keys) if key in self.entries]:
            self._drop(entry, "dropped")
        return self._serve()

    @property
    def open_prefetches(self) -> int:
        """Prefetches that have no outcome yet."""
        return sum(op.prefetch for op in self._ops.values())

    def check(self) -> None:
        """AssertionError unless all adds up: every slot is free or has one user, every prefetch has one outcome."""
        of_ops = {op.entry for op in self._ops.values() if op.entry is not None}
        entries = {*self.entries.values(), *of_ops, *(entry for entry, _ in self._loading.values())}
        places = [(entry.offset, entry.size) for entry in entries]
        places += [(op.offset, op.asked.size) for op in self._ops.values() if op.asked.writes]
        self.slots.check((offset, size) for offset, size in places if offset is not None)
        for entry in entries:
            assert entry.users == sum(op.entry is entry for op in self._ops.values())
            assert entry.offset is not None or entry.saved, "an entry that is nowhere"
        assert self.disk_used == sum(entry.size for entry in self.entries.values())
        assert self._disk_bytes is None or self.disk_used <= self._disk_bytes
        ended = sum(number for name, number in self.counts.items() if name[0] == "prefetches")
        assert self.counts["prefetches_requested",] == ended + self.open_prefetches

    # Ops

    def _serve(self) -> list[Instruction]:
        while self._queue and (self._queue[0].asked.number not in self._ops or self._place(self._queue[0])):
            self._queue.popleft()
        out, self._out = self._out, []
        return out

    def _place(self, op: _Op) -> bool:
        """Whether the first op in line has its slot, or will have it; if not it waits for one, or for a writer."""
        asked, entry = op.asked, self.entries.get(op.asked.key)
        if asked.size not in self.slots:
            self.counts["refusals", "too_large"] += 1
            self._give(op, None)
        elif asked.writes:
            offset = self._take(asked.size)
            if offset is None:
                return False
            self._give(op, offset)
        elif self._awaits_writer(asked):
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

    def _load(self, op: _Op, entry: TierEntry) -> bool:
        """Whether an entry that is on disk alone can be loaded now."""
        self._begin_prefetch(op)
        offset = self._take(entry.size) if len(self._loading) < MOST_LOADS else None
        if offset is None:
            return False
        entry.offset, entry.loading = offset, True
        self._loading[ticket := next(self._tickets)] = (entry, [])
        self._out.append(Load(ticket, entry.key, offset, entry.size))
        return True

    def _use(self, op: _Op, entry: TierEntry) -> None:
        op.entry, entry.users = entry, entry.users + 1
        if entry.loading:
            self.counts.update([("tier_lookups", "host", "miss"), ("tier_lookups", "disk", "hit")])
            next(waiting for of, waiting in self._loading.values() if of is entry).append(op)
        else:
            self.counts["tier_lookups", "host", "hit"] += 1
            self._give(op, entry.offset)

    def _give(self, op: _Op, offset: int | None) -> None:
        op.offset = offset
        if offset is None:
            self._end_prefetch(op, "unfulfilled")
        self._out.append(Give(op.asked.number, offset))

    def _awaits_writer(self, asked: AskedOp) -> bool:
        return any(number < asked.number for number in self._writers.get(asked.key, ()))

    def _known(self, number: int) -> _Op | None:
        op = self._ops.get(number)
        self.counts["refusals", "stale_event"] += op is None
        return op

    def _end(self, op: _Op) -> None:
        del self._ops[op.asked.number]
        self._forget_writer(op.asked)

    def _forget_writer(self, asked: AskedOp) -> None:
        numbers = self._writers.get(asked.key, set())
        numbers.discard(asked.number)
        if not numbers:
            self._writers.pop(asked.key, None)

    # Entries

    def _take(self, size: int) -> int | None:
        offset, evicted = self.slots.take(size)
        if evicted is not None:
            self._count_move("host", "disk", "eviction", size)
        return offset

    def _publish(self, asked: AskedOp, offset: int) -> None:
        """What was written can be found from now on, instead of what had its key."""
        if asked.key in self.entries:
            self._drop(self.entries[asked.key], "replaced")
        entry = TierEntry(asked.key, asked.size, offset)
        self._add(entry)
        self._keep_disk_bound()
        self.disk_peak = max(self.disk_peak, self.disk_used)
        if not entry.gone:
            self._saving[ticket := next(self._tickets)] = entry
            self._out.append(Save(ticket, asked.number, asked.key, offset))

    def _add(self, entry: TierEntry) -> None:
        self.entries[entry.key] = entry
        self.disk_used += entry.size

    def _drop(self, entry: TierEntry, reason: DropReason) -> None:
        """Nobody finds the entry any more. What is being saved is never published then, so its slot need not wait."""
        del self.entries[entry.key]
        entry.gone = True
        self.disk_used -= entry.size
        self.counts["entries_dropped", reason] += 1
        self._out.append(Remove(entry.key))
        self._settle(entry)

    def _settle(self, entry: TierEntry) -> None:
        """Where no op uses the entry: rank it, or free its slot if it is gone."""
        if entry.evictable:
            self.slots.rank(entry, self._next_use(entry))
        elif entry.gone and not entry.users and not entry.loading:
            self.slots.leave(entry)

    def _next_use(self, entry: TierEntry) -> float:
        uses = self._uses.get(entry.key)
        return uses[0][1] if uses else math.inf

    def _keep_disk_bound(self) -> None:
        while self._disk_bytes is not None and self.disk_used > self._disk_bytes:
            self._drop(max(self.entries.values(), key=self._next_use), "evicted")

    def _reconsider(self, segment: int) -> list[Instruction]:
        """Drop what the plan reads in no segment from this one on, and rank the others anew; what no plan has stays."""
        for entry in list(self.entries.values()):
            if self._plan.get(entry.key) and self._plan[entry.key][-1][0] < segment:
                self._drop(entry, "dropped")
        self._keep_disk_bound()
        self.slots.rank_none()
        for entry in self.entries.values():
            self._settle(entry)
        return self._serve()

    # Counts

    def _begin_prefetch(self, op: _Op) -> None:
        if not op.prefetch:
            op.prefetch = True
            self.counts["prefetches_requested",] += 1

    def _end_prefetch(self, op: _Op, outcome: Outcome) -> None:
        if op.prefetch:
            op.prefetch = False
            self.counts["prefetches", "late" if op.needed and outcome == "useful" else outcome] += 1
            self.counts["prefetch_wasted_bytes",] += op.asked.size if outcome == "wasted" else 0

    def _count_move(self, source: str, target: str, cause: str, size: int) -> None:
        self.counts["tier_moves", source, target, cause] += 1
        self.counts["tier_moved_bytes", source, target, cause] += size
