"""How a request gets what it asked for: every read brought to its tier and pinned, a place for every write."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TypeVar

from edit_ray.cache.tiering.account import Entry
from edit_ray.cache.tiering.events import Failure, Granted, Key, Refusal, Refused
from edit_ray.cache.tiering.requests import Given, Request, Wanted, Writers
from edit_ray.cache.tiering.residency import Residency

T = TypeVar("T")
_WAITING = 32  # so many in line have room made for them at once


class Serving:
    """Waiting requests in their order. What serving the first one begins goes on when the moves in flight report."""

    def __init__(self, tiers: Residency, max_loads: int | None) -> None:
        self.queue: deque[Request] = deque()
        self.granted: dict[int, Request] = {}
        self.writers = Writers()
        self._tiers, self._max_loads = tiers, max_loads
        self._loaders: dict[int, tuple[Request, Wanted]] = {}  # ticket -> whose move it is

    def serve(self) -> None:
        """Grant what can be granted now, one request after the other."""
        while self.queue:
            request, before = self.queue[0], len(self._tiers.out)
            if self.gather(request):
                self.queue.popleft()
                self._grant(request)
            elif len(self._tiers.out) > before:
                continue  # something has changed: there may be room now
            elif self._tiers.ways or (self.granted and request.kind != "hint"):
                return
            else:
                self._give_up(request)

    def refuse(self, request: Request, reason: Refusal, level: int, needed: int) -> None:
        """Take a waiting request out of the line: it can never be served."""
        self._tiers.counters.refuse(reason)
        self._tiers.out.append(Refused(request.number, reason, self._tiers.accounts[level].name, needed))
        self.give_back(request)

    def give_back(self, request: Request) -> None:
        """Undo a request, waiting or granted. What it has lifted stays in line until a tier is found for it."""
        granted = self.granted.pop(request.number, None) is not None
        self.writers.remove(request)
        for write in request.writes:
            self._tiers.forget_unless_found(write.key)
            if write.place is not None:
                self._tiers.release(write.place, granted)
        lifted = [read for read in request.reads if self._is_lifted(read)]
        for read in request.reads:
            self._tiers.ahead.end(read, "wasted" if read.settled else "cancelled")
            if read not in lifted:
                self.release(read)
        request.become_rest(lifted)
        if request in self.queue and not lifted:
            self.queue.remove(request)

    def gather(self, request: Request) -> bool:
        """Go as far as it goes now; whether all is in place, or known to be none."""
        request.to_find = [read for read in request.to_find if not self._find(request, read)]
        waiting = Counter[int]()  # by level, the bytes of those that must be served before the next may be
        request.to_bring = _left_of(request.to_bring, lambda read: self._bring(request, read, waiting))
        request.to_place = _left_of(request.to_place, lambda write: self._give(request, write, waiting))
        return request.settled

    def release(self, read: Wanted) -> None:
        """Take back what was done for a read."""
        if read.ticket is not None:
            del self._loaders[read.ticket]
        if read.entry is not None:
            self._tiers.unpin(read.entry)
        read.entry = read.ticket = None
        read.settled = True

    def miss(self, read: Wanted) -> None:
        """There is nothing to read, or no way to bring it."""
        self.release(read)
        self._tiers.ahead.end(read, "unfulfilled")

    def consume(self, key: Key) -> None:
        """Tell the eviction policy that an entry was read."""
        changed_all = self._tiers.eviction.read(key)
        self._tiers.rerank(list(self._tiers.entries) if changed_all else (key,))

    # Moves report

    def landed(self, ticket: int) -> None:
        request, read = self._loaders.pop(ticket, (None, None))
        self._tiers.landed(ticket)
        if request is not None and read is not None and read.entry is not None:
            read.ticket = None
            request.moving -= 1
            if read.entry.doomed or read.entry.level == self._target(request, read.entry):
                self._settle(read)
            else:
                request.to_bring.insert(0, read)

    def failed(self, ticket: int, failure: Failure) -> None:
        request, read = self._loaders.get(ticket, (None, None))
        self._tiers.failed(ticket, failure)
        if request is not None and read is not None:
            request.moving -= 1
            self.miss(read)

    # Steps

    def _grant(self, request: Request) -> None:
        if request.kind in ("segment", "demand"):
            self.granted[request.number] = request
            reads = tuple(read.entry.place if read.entry else None for read in request.reads)
            self._tiers.counters.misses += reads.count(None)
            self._tiers.out.append(Granted(request.number, reads, tuple(write.place for write in request.writes)))
            return
        for read in reversed(request.reads):  # so that what is used last goes first
            if request.kind == "hint" and read.entry is not None:
                self._tiers.ahead.brought(read, read.entry)
                if not read.entry.doomed:
                    self._tiers.eviction.touch(read.key)
            self.release(read)

    def _give_up(self, request: Request) -> None:
        """Nothing in flight or granted could make room: a hint takes what it has, others can never be served."""
        if request.kind == "hint":
            lifted = [read for read in request.to_bring if self._is_lifted(read)]
            request.reads = [read for read in request.reads if read not in lifted]
            for read in [*request.to_find, *request.to_bring]:
                if read not in lifted:
                    self.miss(read)
                self._tiers.ahead.end(read, "unfulfilled")
            request.to_find, request.to_bring = [], []
            rest = Request(request.number, "rest")
            rest.become_rest(lifted)
            self.queue.insert(1, rest)
            return
        needed = [read.entry.size for read in request.reads if read.entry] + [write.size for write in request.writes]
        self.refuse(request, "no_room", 0, sum(needed))

    def _is_lifted(self, read: Wanted) -> bool:
        """Whether a read's entry stands in staging, or is on its way to there."""
        entry, staging = read.entry, self._tiers.staging
        if entry is None:
            return False
        return entry.level == staging or (entry.move is not None and self._tiers.ways[entry.move].level == staging)

    def _find(self, request: Request, read: Wanted) -> bool:
        """Whether it is known now where the entry is, or that there is none; if there is one it is pinned."""
        if self.writers.size_before(read.key, request.number) is not None:
            return False
        entry = self._tiers.entries.get(read.key)
        if entry is not None and entry.move is not None:
            return False  # on another's errand: wait until it is there
        if entry is not None:
            self._tiers.pin(entry)
            read.entry = entry
            if request.kind in ("segment", "demand"):
                self._tiers.counters.find(entry.place.tier)
        if request.kind == "demand":
            self.consume(read.key)
        if entry is None or entry.level == self._target(request, entry):
            self._settle(read)
        else:
            request.to_bring.append(read)
        return True

    def _settle(self, read: Wanted) -> None:
        """It is in place; or a miss, also if it was dropped meanwhile, as only a later request can write it anew."""
        if read.entry is None or read.entry.doomed:
            self.miss(read)
        else:
            read.settled = True

    def _target(self, request: Request, entry: Entry) -> int | None:
        """The level where a read wants its entry; None for one in staging that is not worth a place in any tier."""
        tiers, lifted = self._tiers, entry.level == self._tiers.staging
        if request.kind in ("segment", "hint"):
            first = tiers.first_level(entry.size)
            return entry.level if first is None else min(first, entry.level)
        if not lifted and (not request.promote or tiers.eviction.dead(entry.key)):
            return entry.level
        best = tiers.best_level(entry.size, tiers.eviction.order(entry.key), 0, entry.level)
        return entry.level if best is None and not lifted else best

    def _bring(self, request: Request, read: Wanted, waiting: Counter[int]) -> bool:
        """Whether the entry is in place, on its way, or lost; if not it waits for room, or for those who read it."""
        tiers, entry = self._tiers, read.entry
        target = None if entry is None or entry.doomed else self._target(request, entry)
        if entry is None or target is None or target == entry.level:
            if entry is not None and target is None and not entry.doomed:
                tiers.drop(entry, "evicted")
            self._settle(read)
            return True
        if entry.pins > 1 or (self._max_loads is not None and len(self._loaders) >= self._max_loads):
            return False
        if request.kind == "hint" and tiers.room(target) < waiting[target] + entry.size:
            return False  # what is in the way was promised to others
        if waiting[target] or tiers.accounts[target].free < entry.size:
            if entry.level != tiers.staging and tiers.accounts[tiers.staging].free >= entry.size:
                target = tiers.staging
            elif not self._has_room(target, entry.size, waiting):
                return False
        tiers.ahead.ask(request, read)
        waited_for = request.needed or request.kind == "demand"
        read.ticket = tiers.move(entry, target, "demand" if waited_for else "prefetch")
        self._loaders[read.ticket] = (request, read)
        request.moving += 1
        return True

    def _give(self, request: Request, write: Given, waiting: Counter[int]) -> bool:
        """Whether the write has a place, or is not kept; if not it waits for room."""
        tiers, level = self._tiers, self._tiers.first_level(write.size)
        if level is None:
            tiers.counters.refuse("too_large")
            return True
        if request.kind == "demand":
            tiers.eviction.touch(write.key)
            tiers.rerank((write.key,))
            best = tiers.best_level(write.size, tiers.eviction.order(write.key), 0, tiers.staging)
            if best is None or tiers.eviction.dead(write.key):
                tiers.counters.unkept += 1
                tiers.forget_unless_found(write.key)
                return True
            level = best
        if not self._has_room(level, write.size, waiting):
            return False
        write.place = tiers.reserve(write.key, write.size, level)
        return True

    def _has_room(self, level: int, size: int, waiting: Counter[int]) -> bool:
        """Whether so many bytes may be taken there now; if not, room is being made, and those in line come first."""
        first, account = not waiting[level], self._tiers.accounts[level]
        if first and account.free >= size:
            return True
        waiting[level] += size
        self._tiers.make_room(level, waiting[level])
        if first and account.free >= size:
            waiting[level] = 0
            return True
        return False


def _left_of(those: list[T], serve: Callable[[T], bool]) -> list[T]:
    """Those that could not be served; with some that must wait, the others after them are not tried yet."""
    left: list[T] = []
    for at, one in enumerate(those):
        if not serve(one):
            left.append(one)
            if len(left) == _WAITING:
                return left + those[at + 1 :]
    return left
