"""Where every entry is, and how room is made for another one: the planner's half that knows no requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edit_ray.cache.tiering.account import Account, Entry, Ranking
from edit_ray.cache.tiering.ahead import Ahead
from edit_ray.cache.tiering.counters import Cause, Counters
from edit_ray.cache.tiering.events import DropReason, Failure, Free, Instruction, Key, Move, Place
from edit_ray.cache.tiering.eviction import EvictionPolicy, Order

STAGING = "staging"


@dataclass(slots=True)
class _Way:
    """A move under way: its target is reserved, its source still resident."""

    entry: Entry
    target: Place
    level: int
    cause: Cause
    retried: bool = False


class Residency:
    """Entries and places of all tiers, fastest first; `staging` is one more, behind the last, for copies on their way.

    What it decides stands in `out`, in order, until someone takes it.
    """

    def __init__(
        self,
        tiers: Sequence[tuple[str, int | None]],
        staging_bytes: int | None,
        eviction: EvictionPolicy,
        counters: Counters,
    ) -> None:
        self.accounts = [Account(name, budget) for name, budget in (*tiers, (STAGING, staging_bytes))]
        self.staging = len(tiers)
        self.eviction, self.counters, self.ahead = eviction, counters, Ahead(counters.prefetch)
        self.entries: dict[Key, Entry] = {}  # what can be found
        self.out: list[Instruction] = []
        self.ways: dict[int, _Way] = {}  # by the ticket of their target
        self._rankings = [Ranking() for _ in tiers]
        self._reserved: dict[int, tuple[Place, int]] = {}  # by ticket, with the level
        self._resident: dict[int, Entry] = {}  # by the ticket of their place
        self._last_ticket = 0

    # Places

    def reserve(self, key: Key, size: int, level: int) -> Place:
        """A place to be filled; there must be room for it."""
        self._last_ticket += 1
        self.accounts[level].reserve(size)
        place = Place(self._last_ticket, key, size, self.accounts[level].name)
        self._reserved[place.ticket] = (place, level)
        return place

    def release(self, place: Place, granted: bool = True) -> None:
        """Give up a place that is reserved; where it was never granted nobody has to free it."""
        _, level = self._reserved.pop(place.ticket)
        self.accounts[level].reserved -= place.size
        if granted:
            self.out.append(Free(place))

    def publish(self, place: Place) -> Entry:
        """What was written into a reserved place can be found from now on, instead of what had its key."""
        before = self.entries.get(place.key)
        if before is not None:
            self.drop(before, "replaced")
        entry = Entry(place, self._reserved[place.ticket][1])
        self._fill(entry, place)
        self.counters.wrote(place.tier, place.size)
        self.entries[place.key] = entry
        self.counters.stored += 1
        self.eviction.touch(place.key)
        self._settle(entry)
        return entry

    def adopt(self, key: Key, size: int, level: int) -> None:
        """A tier holds this already; what goes first there makes room for it, or it goes itself."""
        account = self.accounts[level]
        if key not in self.entries and account.could_hold(size):
            if account.free < size:
                self.evict(level, size - int(account.free))
            if account.free >= size:
                self.publish(self.reserve(key, size, level))
                self.counters.wrote(account.name, -size)  # it was there before
                return
        self._last_ticket += 1
        self.out.append(Free(Place(self._last_ticket, key, size, account.name)))

    def _fill(self, entry: Entry, place: Place) -> None:
        _, level = self._reserved.pop(place.ticket)
        self.accounts[level].fill(place.size)
        self._resident[place.ticket] = entry
        entry.place, entry.level = place, level

    def _free(self, place: Place, level: int) -> None:
        del self._resident[place.ticket]
        self.accounts[level].resident -= place.size
        self.out.append(Free(place))

    # Entries

    def pin(self, entry: Entry) -> None:
        entry.pins += 1
        self._unrank(entry)

    def unpin(self, entry: Entry) -> None:
        entry.pins -= 1
        self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Where nothing holds an entry any more: rank it, or let it go if it is of no use."""
        if entry.pins or entry.move is not None:
            return
        if entry.doomed:
            self._free(entry.place, entry.level)
        elif self.eviction.dead(entry.key):
            self.drop(entry, "dead")
        elif entry.level != self.staging:
            self._rankings[entry.level].add(entry, self.eviction.order(entry.key))

    def _unrank(self, entry: Entry) -> None:
        if entry.rank is not None:
            self._rankings[entry.level].discard(entry)

    def drop(self, entry: Entry, reason: DropReason) -> None:
        """Nobody finds the entry any more; its bytes go when nobody uses them."""
        if self.entries.get(entry.key) is entry:
            del self.entries[entry.key]
            self.eviction.forget(entry.key)
        self._unrank(entry)
        self.counters.drop(reason)
        self.ahead.wasted(entry)
        entry.doomed = True
        self._settle(entry)

    def forget_unless_found(self, key: Key) -> None:
        """The eviction policy was told of an entry that has come to nothing."""
        if key not in self.entries:
            self.eviction.forget(key)

    def rerank(self, keys: Iterable[Key]) -> None:
        """The order of these has changed."""
        for entry in [self.entries[key] for key in keys if key in self.entries]:
            if entry.evictable and entry.level != self.staging:
                self._unrank(entry)
                self._settle(entry)

    def by_level(self, level: int) -> list[Entry]:
        """The entries of a tier that can be found, in the order in which they would go."""
        here = [entry for entry in self.entries.values() if entry.level == level]
        return sorted(here, key=lambda entry: self.eviction.order(entry.key))

    # Moves

    def move(self, entry: Entry, level: int, cause: Cause, retried: bool = False) -> int:
        """Begin to move an entry to where there is room for it; the ticket."""
        self._unrank(entry)
        target = self.reserve(entry.key, entry.size, level)
        entry.move = target.ticket
        self.ways[target.ticket] = _Way(entry, target, level, cause, retried)
        self.accounts[entry.level].leaving += entry.size
        self.out.append(Move(entry.place, target))
        return target.ticket

    def is_spill(self, ticket: int) -> bool:
        way = self.ways[ticket]
        return way.entry.level < way.level < self.staging

    def landed(self, ticket: int) -> None:
        """A move has come to its end."""
        spill, way, entry, place, level = self._end(ticket)
        if entry.doomed:
            self.release(way.target)
            return self._settle(entry)
        self._fill(entry, way.target)
        self.counters.wrote(way.target.tier, entry.size)
        self.counters.moved(place.tier, way.target.tier, way.cause, entry.size)
        self._free(place, level)
        if spill:
            self.counters.spills += 1
            self.ahead.wasted(entry)
        self._settle(entry)

    def failed(self, ticket: int, failure: Failure) -> None:
        """A move has failed: a spill loses the entry, a load only what is `lost`; a full tier gets a second chance."""
        spill, way, entry, _, level = self._end(ticket)
        self.counters.fail(f"{'spill' if spill else 'load'} {failure}")
        self.release(way.target)
        if entry.doomed:
            self._settle(entry)
        elif spill and failure == "full" and not way.retried:
            self.evict(way.level, entry.size)
            self.counters.retries += 1
            self.move(entry, way.level, "eviction", retried=True)
        elif spill:
            self.drop(entry, "full" if failure == "full" else "spill_failed")
        elif failure == "lost" or level == self.staging:
            self.drop(entry, "lost")
        else:
            self._settle(entry)

    def _end(self, ticket: int) -> tuple[bool, _Way, Entry, Place, int]:
        spill, way = self.is_spill(ticket), self.ways.pop(ticket)
        way.entry.move = None
        self.accounts[way.entry.level].leaving -= way.entry.size
        return spill, way, way.entry, way.entry.place, way.entry.level

    def evict(self, level: int, size: int) -> None:
        """Drop what goes first, at least so many bytes of it: the tier holds less than its budget says."""
        for entry in list(self._rankings[level]):
            if size <= 0:
                break
            size -= entry.size
            self.drop(entry, "evicted")

    # Room

    def level_of(self, tier: str) -> int:
        """The level of a tier by its name."""
        return [account.name for account in self.accounts].index(tier)

    def first_level(self, size: int) -> int | None:
        """The first tier that could hold so many bytes."""
        return next((i for i in range(self.staging) if self.accounts[i].could_hold(size)), None)

    def best_level(self, size: int, order: Order, first: int, last: int) -> int | None:
        """The first tier from `first` to before `last` where an entry of this order would not be the first to go."""
        return next((i for i in range(first, last) if self._accepts(i, size, order)), None)

    def _accepts(self, level: int, size: int, order: Order) -> bool:
        account = self.accounts[level]
        if not account.could_hold(size):
            return False
        short = size - account.free - account.leaving
        for entry in self._rankings[level] if short > 0 else ():
            if entry.size and entry.rank is not None and entry.rank[0] > order:
                return False
            short -= entry.size
            if short <= 0:
                break
        return True  # or what is in the way is pinned or in flight, and will be ranked when it is not

    def room(self, level: int) -> float:
        """Bytes that are free, leaving, or could leave."""
        account = self.accounts[level]
        return account.free + account.leaving + self._rankings[level].bytes

    def make_room(self, level: int, wanted: int) -> None:
        """Begin to move out what goes first, until so many bytes are free or leaving; nothing if that cannot be now."""
        if wanted > self.room(level):
            return
        short = wanted - self.accounts[level].free - self.accounts[level].leaving
        victims = []
        for entry in self._rankings[level] if short > 0 else ():
            if entry.size:
                victims.append(entry)
                short -= entry.size
            if short <= 0:
                break
        for entry in victims:
            self._push_out(entry)

    def _push_out(self, entry: Entry) -> None:
        lower = self.best_level(entry.size, self.eviction.order(entry.key), entry.level + 1, self.staging)
        if lower is None:
            return self.drop(entry, "evicted")
        self.make_room(lower, entry.size)
        if self.accounts[lower].free >= entry.size:
            self.move(entry, lower, "eviction")

    def check(self) -> None:
        """AssertionError if any account is not what its places add up to, or is over its budget."""
        for level, account in enumerate(self.accounts):
            here = [entry for entry in self._resident.values() if entry.level == level]
            coming = [place.size for place, of in self._reserved.values() if of == level]
            assert account.resident == sum(entry.size for entry in here), account.name
            assert account.leaving == sum(entry.size for entry in here if entry.move is not None), account.name
            assert account.reserved == sum(coming), account.name
            if account.budget is not None:
                assert account.resident + account.reserved + account.free == account.budget, account.name
                assert account.free >= 0, account.name
        for level, ranking in enumerate(self._rankings):
            ranked = [entry for entry in self.entries.values() if entry.level == level and entry.evictable]
            assert len(ranking) == len(ranked), self.accounts[level].name
            assert ranking.bytes == sum(entry.size for entry in ranked), self.accounts[level].name
            assert all(entry.rank is not None for entry in ranked), self.accounts[level].name
