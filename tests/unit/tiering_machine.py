"""The planner against a dict: random orders of everything that can happen, with a model that holds the bytes.

The model is the shell: it has a place for every byte that the planner has planned, and a value in it. It checks after
each event that no tier holds more than its budget, that nothing that is in use is freed or moved, that requests are
granted in order, and that what can be found is what was written last.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edit_ray.cache.tiering.events import (
    Abandon,
    Advance,
    Complete,
    Drop,
    Follow,
    Found,
    Free,
    Full,
    Granted,
    Move,
    Moved,
    MoveFailed,
    Need,
    Prefetch,
    Prepare,
    Read,
    Refused,
    Write,
)
from edit_ray.cache.tiering.planner import TierPlanner
from edit_ray.cache.tiering.residency import STAGING

KEYS = st.sampled_from([(name,) for name in "abcdef"])
SIZES = st.sampled_from([2, 1, 3, 4, 0])
INDEX = st.integers(0, 63)


class AnyOrder(RuleBasedStateMachine):
    Planner = TierPlanner
    fired = None  # how often each event was in the histories: a Counter

    @initialize(
        budgets=st.lists(st.sampled_from([4, 3, 5, 6, 8, None]), min_size=1, max_size=3),
        staging=st.sampled_from([0, 3, None]),
        eviction=st.sampled_from(["lru", "furthest_next_use"]),
        max_loads=st.sampled_from([None, 1]),
        found=st.lists(st.tuples(KEYS, SIZES), max_size=3),
        written=st.lists(st.tuples(KEYS, SIZES), max_size=4),
    )
    def start(self, budgets, staging, eviction, max_loads, found, written):
        names = ["device", "host", "disk"][-len(budgets) :]
        self.budgets = {**dict(zip(names, budgets, strict=True)), STAGING: staging}
        self.planner = self.Planner(
            list(zip(names, budgets, strict=True)), eviction, staging_bytes=staging, max_loads=max_loads
        )
        self.places = {}  # ticket -> place
        self.bytes = {}  # ticket -> the value that stands there
        self.written = {}  # key -> the value written last
        self.asked = {}  # number -> the request that waits, and what each of its reads may find
        self.granted = {}  # number -> the request and its grant
        self.moves = []
        self.failed = set()  # keys whose way up failed since the last grant
        self.ended, self.landed = [], []  # numbers and tickets that are stale
        self.values = self.numbers = self.last_granted = 0
        for key, size in found:
            known = self.planner.place(key)
            self.carry_out(self.planner.handle(Found(key, size, names[-1])), adopting=True)
            place = self.planner.place(key)
            if place is not None and place != known:
                self.places[place.ticket] = place
                self.written[key] = self.bytes[place.ticket] = self.next_value()
        for key, size in written:
            self.write(key, size)
            self.finish()

    def finish(self):
        while self.moves or self.granted:
            if self.moves:
                self.moved(1, 0)
            else:
                self.complete(0, True)

    # What the shell does.

    def next_value(self):
        self.values += 1
        return self.values

    def handle(self, event, name):
        type(self).fired[name] += 1
        self.carry_out(self.planner.handle(event))

    def ask(self, name, make, reads=(), writes=()):
        self.numbers += 1
        event = make(self.numbers)
        if not isinstance(event, Prefetch):
            may_find = {key: {self.written.get(key)} for key in reads}
            self.asked[self.numbers] = (event, may_find, dict(writes))
        self.handle(event, name)

    def carry_out(self, instructions, adopting=False):
        for instruction in instructions:
            match instruction:
                case Free(place):
                    if adopting and place.ticket not in self.places:
                        continue  # of what was found and not taken
                    self.free(place)
                case Move(source, target):
                    self.move(source, target)
                case Granted(number, reads, writes):
                    self.grant(number, reads, writes)
                case Refused(number, reason, tier, needed):
                    assert reason != "too_large" or needed > self.budgets[tier]
                    del self.asked[number]
                    self.ended.append(number)

    def in_use(self):
        """Tickets that a holder reads or writes now."""
        return {
            place.ticket
            for _, grant in self.granted.values()
            for place in (*grant.reads, *grant.writes)
            if place is not None
        }

    def free(self, place):
        assert self.places.pop(place.ticket) == place
        assert place.ticket not in self.in_use(), f"{place} is in use"
        assert all(place not in (move.source, move.target) for move in self.moves), f"{place} is in flight"
        self.bytes.pop(place.ticket, None)

    def move(self, source, target):
        assert source.ticket not in self.in_use(), f"{source} is in use"
        assert all(source not in (move.source, move.target) for move in self.moves), f"{source} is in flight"
        assert source.ticket in self.bytes
        assert (target.key, target.size) == (source.key, source.size)
        assert target.tier != source.tier
        self.place(target)
        self.moves.append(Move(source, target))

    def place(self, place):
        assert place.ticket not in self.places, "a ticket is given once"
        self.places[place.ticket] = place

    def grant(self, number, reads, writes):
        assert number > self.last_granted, "an earlier request was overtaken"
        assert all(waiting >= number for waiting in self.asked), "an earlier request was overtaken"
        self.last_granted = number
        event, may_find, sizes = self.asked.pop(number)
        for key, place in zip(may_find, reads, strict=True):
            if place is None:
                assert self.planner.place(key) is None or key in self.failed
                continue
            assert self.bytes[place.ticket] in may_find[key], f"{key} is not what was written"
            if isinstance(event, Prepare):
                assert place.tier == self.first_tier(place.size)
        for (key, size), place in zip(sizes.items(), writes, strict=True):
            if place is not None:
                assert (place.key, place.size) == (key, size)
                self.place(place)
        self.granted[number] = (event, Granted(number, reads, writes))
        self.failed = set()

    def first_tier(self, size):
        return next(name for name, budget in self.budgets.items() if budget is None or size <= budget)

    # Events.

    @rule(reads=st.lists(KEYS, max_size=3, unique=True), writes=st.dictionaries(KEYS, SIZES, max_size=3))
    def prepare(self, reads, writes):
        self.ask("prepare", lambda n: Prepare(n, tuple(reads), tuple(writes.items())), reads, writes)

    @rule(key=KEYS, promote=st.booleans())
    def read(self, key, promote):
        self.ask("read", lambda n: Read(n, key, promote), [key])

    @rule(key=KEYS, size=SIZES)
    def write(self, key, size):
        self.ask("write", lambda n: Write(n, key, size), writes={key: size})

    @rule(keys=st.lists(KEYS, max_size=4))
    def prefetch(self, keys):
        self.ask("prefetch", lambda n: Prefetch(n, tuple(keys)))

    @precondition(lambda self: self.asked)
    @rule(index=INDEX)
    def need(self, index):
        self.handle(Need(list(self.asked)[index % len(self.asked)]), "need")

    @precondition(lambda self: self.granted)
    @rule(index=INDEX, all_of_it=st.booleans())
    def complete(self, index, all_of_it):
        number = list(self.granted)[index % len(self.granted)]
        _, grant = self.granted.pop(number)
        written = [place for place in grant.writes if place is not None][: None if all_of_it else 1]
        for place in written:
            self.written[place.key] = self.bytes[place.ticket] = self.next_value()
            for _, may_find, _ in self.asked.values():
                if place.key in may_find:
                    may_find[place.key] = {self.written[place.key]}
        self.ended.append(number)
        self.handle(Complete(number, None if all_of_it else tuple(place.key for place in written)), "complete")

    @precondition(lambda self: self.granted or self.asked)
    @rule(index=INDEX)
    def give_up(self, index):
        number = [*self.granted, *self.asked][index % (len(self.granted) + len(self.asked))]
        self.forget(number)
        self.handle(Abandon(number), "abandon")

    def forget(self, number):
        self.granted.pop(number, None)
        self.asked.pop(number, None)
        self.ended.append(number)

    @rule(keys=st.lists(KEYS, max_size=2), reason=st.sampled_from(["dropped", "lost", "full"]))
    def drop(self, keys, reason):
        if reason == "full" and not keys:
            return self.handle(Full(next(iter(self.budgets)), 2), "full")
        for key in keys:
            self.written.pop(key, None)
        self.handle(Drop(tuple(keys), reason), "drop")

    @precondition(lambda self: self.moves)
    @rule(count=st.integers(1, 3), index=INDEX)
    def moved(self, count, index):
        for _ in range(min(count, len(self.moves))):
            move = self.moves.pop(index % len(self.moves))
            self.bytes[move.target.ticket] = self.bytes[move.source.ticket]
            self.landed.append(move.target.ticket)
            self.handle(Moved(move.target.ticket), "moved")

    @precondition(lambda self: self.moves)
    @rule(index=INDEX, failure=st.sampled_from(["lost", "transient", "full"]))
    def move_failed(self, index, failure):
        move = self.moves.pop(index % len(self.moves))
        self.landed.append(move.target.ticket)
        self.failed.add(move.source.key)
        self.handle(MoveFailed(move.target.ticket, failure), "move_failed")

    @precondition(lambda self: self.ended or self.asked)
    @rule(index=INDEX, which=st.sampled_from(["request", "asked", "move"]), failure=st.sampled_from([None, "lost"]))
    def stale_event(self, index, which, failure):
        if which == "move" and self.landed:
            self.stale_move(index, failure)
        else:
            self.stale_request(index, which == "request")

    def stale_request(self, index, given_up):
        """An event of a request that has ended; or a completion of one that is not granted yet."""
        numbers = self.ended if given_up or not self.asked else [*self.ended, *self.asked]
        if numbers:
            number = numbers[index % len(numbers)]
            self.stale(Abandon(number) if given_up else Complete(number), "stale_request")

    def stale_move(self, index, failure):
        ticket = self.landed[index % len(self.landed)]
        self.stale(MoveFailed(ticket, failure) if failure else Moved(ticket), "stale_move")

    def stale(self, event, name):
        type(self).fired[name] += 1
        before = self.planner.counters.stale
        assert self.planner.handle(event) == []
        assert self.planner.counters.stale == before + 1

    @rule(
        uses=st.one_of(st.none(), st.dictionaries(KEYS, st.lists(st.integers(0, 3), max_size=3), max_size=6)),
        position=st.integers(0, 4),
    )
    def plan(self, uses, position):
        if uses is None:
            return self.handle(Advance(position), "advance")
        order = sorted((position, key) for key, positions in uses.items() for position in positions)
        found = {key: [] for key in uses}
        for place, (at, key) in enumerate(order):
            found[key].append((at, place))
        self.handle(Follow(found), "follow")

    # What always holds.

    @invariant()
    def no_tier_is_over_its_budget_and_all_is_accounted_for(self):
        self.planner.check()
        for account in self.planner.tiers.accounts:
            here = sum(place.size for place in self.places.values() if place.tier == account.name)
            # Of a request that still waits the planner alone knows what is reserved.
            held_back = sum(sum(sizes.values()) for _, _, sizes in self.asked.values())
            assert here <= account.resident + account.reserved <= here + held_back
            assert account.budget == self.budgets[account.name]
            assert account.budget is None or account.resident + account.reserved + account.free == account.budget
            assert account.budget is None or here <= account.budget

    @invariant()
    def what_is_found_is_what_was_written(self):
        for key in self.planner.sizes():
            place = self.planner.place(key)
            assert self.places[place.ticket] == place
            assert self.bytes[place.ticket] == self.written[key]

    def teardown(self):
        """When all has ended, nothing is left over; and whatever waits, waits for something."""
        if not hasattr(self, "planner"):
            return
        self.finish()
        assert not self.asked, "a request waits for nothing"
        self.no_tier_is_over_its_budget_and_all_is_accounted_for()
        self.what_is_found_is_what_was_written()
        for account in self.planner.tiers.accounts:
            assert account.reserved == account.leaving == 0
        assert sum(account.resident for account in self.planner.tiers.accounts) == sum(self.planner.sizes().values())
        self.drop(list(self.written), "dropped")
        assert self.places == {}
        assert self.planner.counters.prefetch.open == 0
        assert self.planner.eviction._last == {}, "the eviction policy remembers what is gone"


EVENTS = (
    *("prepare", "read", "write", "prefetch", "need", "complete", "abandon", "drop", "full"),
    *("moved", "move_failed", "stale_request", "stale_move", "follow", "advance"),
)
