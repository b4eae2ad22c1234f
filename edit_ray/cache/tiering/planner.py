"""WHERE entries live, decided: a plain state machine over keys, bytes and tier names; no clock, no I/O, no tensor.

The states of an entry, and what leads from one to the next:

    (none) ──room is reserved──► storing ──Complete──► resident ──a Move begins──► moving
                                    │                  ▲  │  ▲                       │
                                    │ Abandon          │  │  └──Moved, or a load that failed and may be tried again
                                    ▼                  │  │
                                 (none)       unpinned │  │ pinned       a spill that failed, a load that was lost
                                                       │  ▼                          │
                                                      pinned                         ▼
                                                                                  (none)

`storing` is a reserved place that nobody can find. A `resident` entry is in one tier and counts there. A `moving` one
is still resident in the tier that it leaves, and has a place reserved in the other. An entry goes for good, from any
state, by `Drop`, by a later write of its key, or to make room; where a reader or a move still uses its bytes it is only
out of sight (`doomed`), and they are freed when the last of these ends.

A request is *waiting*, then *granted*, then over: completed or abandoned. Waiting requests are served strictly in
order, the first one until everything it asked for is in place; so a promise is never overtaken, and a request that
cannot be served waits for moves in flight and for granted ones to end. A read of what an earlier request is still
writing waits for that. If there is nothing to wait for, the request is refused: it can never be served.

Room is made by moving down what goes first by the eviction policy, to the next tier that could hold it and where it
would not be the first to go either; out of the last tier it is dropped. What is pinned or in flight never makes room.
The bytes resident and reserved in a tier never exceed its budget. So a swap between two full tiers needs
`staging_bytes` to stand in: what comes up is lifted there first, and the room that it leaves takes what goes down.

Models: dask/distributed's worker_state_machine.py (events, instructions), vLLM's kv_offload (prepare and complete).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edit_ray.cache.tiering.counters import Counters
from edit_ray.cache.tiering.events import (
    Abandon,
    Advance,
    Complete,
    Drop,
    Event,
    Failure,
    Follow,
    Found,
    Full,
    Instruction,
    Key,
    Moved,
    MoveFailed,
    Need,
    Place,
    Prefetch,
    Prepare,
    Read,
    Write,
)
from edit_ray.cache.tiering.eviction import EvictionPolicy, make_eviction
from edit_ray.cache.tiering.requests import Given, Request, Wanted
from edit_ray.cache.tiering.residency import STAGING, Residency
from edit_ray.cache.tiering.serving import Serving


class TierPlanner:
    """Events in, instructions out. `handle` is the only mutator.

    >>> planner = TierPlanner([("host", 2 << 30), ("disk", None)], "furthest_next_use", staging_bytes=64 << 20)
    """

    def __init__(
        self,
        tiers: Sequence[tuple[str, int | None]],
        eviction: str | EvictionPolicy = "lru",
        *,
        staging_bytes: int | None = 0,
        max_loads: int | None = None,
    ) -> None:
        """Args:
            tiers: Name and budget in bytes of each tier, fastest first; None for no bound.
            eviction: What goes first: "lru", "furthest_next_use", another registered name, or an object.
            staging_bytes: Room beyond the budgets for copies on their way up; None for no bound.
            max_loads: How many moves up may be in flight at once; None for no bound.

        Raises:
            ValueError: no tier, two of the same name, or a budget below 0.
        """
        names = [name for name, _ in tiers]
        if not names or len({*names, STAGING}) <= len(names):
            raise ValueError(
                f"The tiers are {', '.join(names) or 'none'}; valid is at least one, each under a name of its own "
                f"that is not {STAGING!r}."
            )
        if max_loads is not None and max_loads < 1:
            raise ValueError(f"max_loads must be 1 or more, or None for no bound; got {max_loads}.")
        self.counters = Counters()
        self.eviction = make_eviction(eviction)
        self.tiers = Residency(tiers, staging_bytes, self.eviction, self.counters)
        self._serving = Serving(self.tiers, max_loads)
        self._last_request = 0

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event. What is stale changes nothing and is counted.

        Raises:
            ValueError: the number of a new request is not above all before.
        """
        match event:
            case Moved(ticket):
                self._moved(ticket)
            case Read(number, key, promote):
                self._ask(Request(number, "demand", reads=[Wanted(key)], promote=promote))
            case Write(number, key, size):
                self._ask(Request(number, "demand", writes=[Given(key, size)]))
            case Complete(number, written):
                self._complete(number, written)
            case Prepare():
                self._prepare(event)
            case Prefetch(number, keys):
                self._prefetch(number, keys)
            case Need(number):
                self._need(number)
            case Abandon(number):
                self._abandon(number)
            case MoveFailed(ticket, failure):
                self._moved(ticket, failure)
            case Drop(keys, reason):
                for entry in [self.tiers.entries[key] for key in dict.fromkeys(keys) if key in self.tiers.entries]:
                    self.tiers.drop(entry, reason)
            case Full(tier, size):
                self.tiers.evict(self.tiers.level_of(tier), size)
            case Found(key, size, tier):
                self.tiers.adopt(key, size, self.tiers.level_of(tier))
            case Follow(uses):
                self.eviction.follow(uses)
                self.tiers.rerank(list(self.tiers.entries))
            case Advance(position):
                self.tiers.rerank(self.eviction.advance(position))
        self._serving.serve()
        out, self.tiers.out = self.tiers.out, []
        return out

    # What can be asked; changes nothing.

    def place(self, key: Key) -> Place | None:
        """Where an entry is, None if it cannot be found."""
        entry = self.tiers.entries.get(key)
        return None if entry is None else entry.place

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, from the slowest tier to the fastest, in the order in which they would go."""
        levels = reversed(range(len(self.tiers.accounts)))
        return {entry.key: entry.size for level in levels for entry in self.tiers.by_level(level)}

    def __len__(self) -> int:
        """How many entries can be found."""
        return len(self.tiers.entries)

    def check(self) -> None:
        """AssertionError unless all adds up: bytes in every tier, prefetches, entries stored and dropped."""
        self.tiers.check()
        assert self.counters.stored == len(self.tiers.entries) + sum(self.counters.drops.values())
        counted = sum(read.counted for request in self._requests() for read in request.reads)
        brought = sum(entry.prefetches for entry in self.tiers.entries.values())
        assert self.counters.prefetch.open == counted + brought

    def _requests(self) -> list[Request]:
        return [*self._serving.queue, *self._serving.granted.values()]

    # Requests come

    def _ask(self, request: Request) -> None:
        if request.number <= self._last_request:
            raise ValueError(f"Requests have numbers that grow: {request.number} came after {self._last_request}.")
        self._last_request = request.number
        if request.kind == "demand":
            keys = {read.key for read in request.reads}
            for hint in self._serving.queue:
                self.tiers.ahead.need([read for read in hint.reads if hint.kind == "hint" and read.key in keys])
        self._serving.writers.add(request)
        self._serving.queue.append(request)

    def _prepare(self, event: Prepare) -> None:
        keys, number = tuple(dict.fromkeys(event.reads)), event.request
        writes = [Given(key, size) for key, size in event.writes]
        request = Request(number, "segment", [Wanted(key) for key in keys], writes)
        self._ask(request)
        needed = Counter[int]()
        for size in [*(self._size_of(key, number) for key in keys), *(size for _, size in event.writes)]:
            level = self.tiers.first_level(size)
            needed[0 if level is None else level] += 0 if level is None else size
        for level, total in needed.items():
            if not self.tiers.accounts[level].could_hold(total):
                return self._serving.refuse(request, "too_large", level, total)
        for read in request.reads:
            self._ask_ahead(request, read)

    def _prefetch(self, number: int, keys: tuple[Key, ...]) -> None:
        """Take what fits into the first tier, in the order of use, up to the first that does not."""
        request, total, full = Request(number, "hint"), 0, False
        first = self.tiers.accounts[0]
        self._ask(request)
        for key in dict.fromkeys(keys):
            read, size = Wanted(key), self._size_of(key, number)
            self._ask_ahead(request, read)
            fits_alone = first.could_hold(size)
            full = full or (fits_alone and not first.could_hold(total + size))
            if fits_alone and not full:
                request.reads.append(read)
                request.to_find.append(read)
                total += size
            else:
                self.tiers.ahead.end(read, "unfulfilled")

    def _size_of(self, key: Key, number: int) -> int:
        """Bytes that a request would read: what an earlier one writes, or what there is."""
        size, entry = self._serving.writers.size_before(key, number), self.tiers.entries.get(key)
        return size if size is not None else 0 if entry is None else entry.size

    def _ask_ahead(self, request: Request, read: Wanted) -> None:
        entry = self.tiers.entries.get(read.key)
        if self._serving.writers.size_before(read.key, request.number) is None and (entry is None or entry.level > 0):
            self.tiers.ahead.ask(request, read)

    def _need(self, number: int) -> None:
        waiting = [request for request in self._serving.queue if request.number == number]
        for request in waiting:
            request.needed = True
            self.tiers.ahead.need(request.reads)
        self.counters.stale += not waiting and number not in self._serving.granted

    # Requests end

    def _complete(self, number: int, written: tuple[Key, ...] | None) -> None:
        request = self._serving.granted.pop(number, None)
        if request is None:
            self.counters.stale += 1
            return
        self._serving.writers.remove(request)
        for write in request.writes:
            if write.place is not None and (written is None or write.key in written):
                self.tiers.publish(write.place)
            elif write.place is not None:
                self.tiers.release(write.place)
                self.tiers.forget_unless_found(write.key)
        for read in request.reads:
            if request.kind == "segment":
                self._serving.consume(read.key)
            if read.entry is not None:
                self.tiers.ahead.used(read.entry)
            self.tiers.ahead.end(read, "useful")
            self._serving.release(read)

    def _abandon(self, number: int) -> None:
        for request in self._requests():
            if request.number == number and request.kind != "rest":
                return self._serving.give_back(request)
        self.counters.stale += 1

    # Moves report

    def _moved(self, ticket: int, failure: Failure | None = None) -> None:
        if ticket not in self.tiers.ways:
            self.counters.stale += 1
        elif failure is None:
            self._serving.landed(ticket)
        else:
            self._serving.failed(ticket, failure)
