"""Random histories of the tier planner: reads get what was written last, and nothing waits for ever or counts twice."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.metrics.catalog import CATALOG, LABELS
from edit_ray.tiers.planner import MOST_LOADS, Give, Load, Remove, Save, TierPlanner, simulate
from edit_ray.tiers.reuse_plan import make_reuse_plan
from edit_ray.tiers.slots import PAGE, AskedOp, Slots, TierEntry, divide, slot_bytes

SIZES = (PAGE, 3 * PAGE)
KEYS = range(6)


def size_of(key):
    return SIZES[key[0] % 2]


class History:
    """Memory and disk on paper: each slot and each file holds the version that was written there."""

    def __init__(self, seed, fired):
        self.draw, self.fired = random.Random(seed), fired
        old = (self.draw.choice(KEYS),)
        self.slots = {size: self.draw.randint(1, 3) for size in SIZES}
        self.bound = self.draw.choice([None, 4 * PAGE, 6 * PAGE])
        self.planner = TierPlanner(self.slots, self.bound, [(old, size_of(old))])
        self.memory, self.files = {}, {old: "old"}  # offset -> what lies there; key -> version
        self.latest = {old: "old"}  # the version that a read may find
        self.moving = []  # loads and saves in flight
        self.ops, self.given, self.disowned = {}, {}, set()  # number -> the op; number -> its offset
        self.saving = {}  # key -> the entry whose save may publish it
        self.number = 0

    def run(self, steps):
        rules = (self.ask, self.go_on, self.done, self.cancel, self.need, self.end_a_move, self.drop, self.follow)
        for _ in range(steps):
            self.draw.choices((*rules, self.completed), (4, 3, 3, 1, 1, 3, 1, 1, 1))[0]()
            assert self.planner.entries.keys() == self.latest.keys(), "what can be read is what was written"
            assert self.planner.disk_used == sum(map(size_of, self.latest))
            assert self.bound is None or self.planner.disk_used <= self.bound
        self.end()

    def act(self, instructions):
        for instruction in instructions:
            match instruction:
                case Give(number, None):
                    assert not self.ops[number].writes, "a write has a slot"
                    self.check_order(number)
                    self.finish(number)
                case Give(number, offset):
                    op = self.ops[number]
                    self.check_order(number)
                    for other, at in self.given.items():
                        alike = at == offset and not op.writes and self.ops[other].key == op.key
                        apart = at + self.ops[other].size <= offset or offset + op.size <= at
                        assert alike or apart, "two ops write to one place"
                    self.given[number] = offset
                    if not op.writes:
                        assert self.memory[offset] == (op.key, self.latest[op.key]), "a wrong entry"
                        self.fired["read"] += 1
                case Load(entry):
                    assert entry.key in self.files, "nothing to load"
                    assert entry.offset not in self.given.values(), "loaded over a slot in use"
                    self.moving.append(instruction)
                    self.memory[entry.offset] = "being loaded"
                case Save(entry, _):
                    self.moving.append(instruction)
                    self.saving[entry.key] = entry
                case Remove(key):
                    for known in (self.files, self.latest, self.saving):
                        known.pop(key, None)

    def check_order(self, number):
        """A read comes after every earlier write of its key that may still be made."""
        op = self.ops[number]
        before = [self.ops[other] for other in self.ops if other < number and other not in self.disowned]
        assert op.writes or all(other.key != op.key or not other.writes for other in before), "a read has overtaken"

    def finish(self, number):
        self.given.pop(number, None)
        del self.ops[number]

    def ask(self):
        asked = []
        for _ in range(self.draw.randint(1, 6)):
            self.number, key = self.number + 1, (self.draw.choice(KEYS),)
            asked.append(AskedOp(self.number, key, size_of(key), self.draw.random() < 1 / 3))
        self.ops |= {op.number: op for op in asked}
        self.act(self.planner.ask(asked))

    def go_on(self):
        """Several ops, and perhaps what is in flight."""
        moves = self.draw.random() < 0.7
        for _ in range(self.draw.randint(1, 6)):
            self.done()
            if moves:
                self.end_a_move()

    def done(self):
        if self.given:
            number = self.draw.choice(list(self.given))
            op, offset = self.ops[number], self.given[number]
            if op.writes:
                self.memory[offset] = (op.key, number)
            instructions = self.planner.done(number)
            self.finish(number)
            if op.writes:
                if op.key in self.latest:  # the first Remove is that of the replaced version
                    instructions.remove(Remove(op.key))
                    self.act([Remove(op.key)])
                self.latest[op.key] = number
                self.fired["write"] += 1
            self.act(instructions)

    def cancel(self):
        if self.ops:
            number = self.draw.choice(list(self.ops))
            if self.draw.random() < 0.5:
                self.disowned.add(number)
                self.act(self.planner.disown(number))
            self.fired["cancel, given" if number in self.given else "cancel, waiting"] += number in self.ops
            if number in self.ops:
                self.finish(number)
                self.act(self.planner.cancel(number))

    def need(self):
        if waiting := sorted(self.ops.keys() - self.given):
            self.act(self.planner.need(self.draw.choice(waiting)))

    def end_a_move(self, failures=(None, None, "bad", "worse")):
        if not self.moving:
            return
        move, failure = self.moving.pop(self.draw.randrange(len(self.moving))), self.draw.choice(failures)
        entry = move.entry
        if isinstance(move, Save):
            reason = self.draw.choice(["full", "spill_failed"]) if failure == "worse" else None
            published = reason is None and self.saving.get(entry.key) is entry
            if published:
                self.files[entry.key] = self.latest[entry.key]
            self.act(self.planner.saved(entry, reason))
            self.fired["saved" if published else "not saved"] += 1
        else:
            there = entry.key in self.files
            failure = "lost" if not there or failure == "worse" else "transient" if failure else None
            if failure == "lost" and not entry.gone:  # else the file is that of a later version
                self.files.pop(entry.key, None)
            if failure is None:
                self.memory[entry.offset] = (entry.key, self.files[entry.key])
            self.act(self.planner.loaded(entry, failure))
            self.fired[f"load {failure}"] += 1

    def drop(self):
        key = (self.draw.choice(KEYS),)
        self.act(self.planner.drop([key]))
        assert key not in self.planner.entries

    def follow(self):
        plan, segment = {}, self.draw.randint(0, 4)
        uses = sorted((self.draw.randint(0, 4), self.draw.choice(KEYS)) for _ in range(self.draw.randint(0, 10)))
        for order, (position, key) in enumerate(uses):
            plan.setdefault((key,), []).append((position, order))
        self.act(self.planner.follow(plan, segment))
        for key in self.planner.entries:
            assert key not in plan or plan[key][-1][0] >= segment, "nobody reads it"

    def completed(self):
        self.act(self.planner.completed(self.draw.randint(0, 4)))

    def end(self):
        """Once moves and ops end, all that is queued is served, every slot is free, and every prefetch has ended."""
        for _ in range(1000):
            if not self.moving and not self.given:
                break
            self.done()
            self.end_a_move([None])
        assert not self.ops, "an op waits for ever"
        counts = self.planner.counts
        ended = sum(number for name, number in counts.items() if name[0] == "prefetches")
        assert counts["prefetches_requested",] == ended
        self.fired["evicted"] += counts["tier_moves", "host", "disk", "eviction"]
        for name, *labels in counts:
            metric = CATALOG[f"edit_ray_{name}_total"]
            assert all(value in LABELS[label] for label, value in zip(metric.labels, labels, strict=True))
        self.planner.drop(list(self.planner.entries))
        assert (self.planner.slots.used, self.planner.disk_used) == (0, 0)
        sizes, end = [size for size, number in self.slots.items() for _ in range(number)], 0
        asked = [AskedOp(self.number + i, ("end",), size, True) for i, size in enumerate(sizes, start=1)]
        for offset, size in sorted(
            (one.offset, op.size) for one, op in zip(self.planner.ask(asked), asked, strict=True)
        ):
            assert offset == end, "a slot is lost, or has two users"
            end += size


def run_histories(number, steps=40):
    """What so many histories have met."""
    fired = Counter()
    for seed in range(number):
        try:
            History(seed, fired).run(steps)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    return fired


EVERYTHING = {"read", "write", "cancel, given", "cancel, waiting", "saved", "not saved"}
EVERYTHING |= {"load None", "load lost", "load transient", "evicted"}


@pytest.mark.parametrize("number", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_histories(number):
    assert set(run_histories(number)) == EVERYTHING


MUTANTS = {
    "a read does not wait for its writer": (TierPlanner, "_awaits_writer", lambda self, op: False),
    "a dropped entry keeps its slot": (TierPlanner, "_settle", lambda self, entry: None),
    "a saved entry counts as unsaved": (TierPlanner, "saved", lambda self, entry, failure=None: []),
    "the disk has no bound": (TierPlanner, "_keep_disk_bound", lambda self: None),
    "a prefetch ends twice": (
        TierPlanner,
        "_end_prefetch",
        lambda self, op, outcome: self.counts.update({("prefetches", outcome): int(op.writes is False)}),
    ),
    "an entry that is being loaded is given at once": (
        TierPlanner,
        "_load",
        lambda self, op, entry: setattr(entry, "offset", self._take(entry.size)) or entry.offset is not None,
    ),
    "an entry in use is evicted": (
        TierEntry,
        "evictable",
        property(lambda entry: entry.offset is not None and not entry.gone),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_planner_fails(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises(Exception):  # noqa: B017, PT011 - an assertion, or any error that follows from a wrong state
        run_histories(1000)


# Single choices


def offered(instructions):
    return {one.number: one.offset for one in instructions if isinstance(one, Give)}


def moves(instructions):
    return [one for one in instructions if isinstance(one, Load | Save)]


def planner_with(slots, *names):
    """Slots of one page, and entries of one page that the disk holds."""
    return TierPlanner({PAGE: slots}, found=[((name,), PAGE) for name in names])


def reads(*names, first=0):
    return [AskedOp(number, (name,), PAGE, False) for number, name in enumerate(names, start=first)]


def store(planner, *keys):
    """Entries of one page that are written and on disk."""
    for number, key in enumerate(keys, start=1000):
        planner.ask([AskedOp(number, key, PAGE, True)])
        (save,) = moves(planner.done(number))
        planner.saved(save.entry)


def in_host(planner):
    return {key for key, entry in planner.entries.items() if entry.offset is not None}


def test_the_entry_read_furthest_in_the_future_is_evicted_first_and_before_it_entries_without_a_plan():
    planner = planner_with(4)
    planner.follow({("a",): [(1, 2)], ("b",): [(1, 0), (3, 9)], ("c",): [(2, 5)]}, 0)
    store(planner, ("a",), ("b",), ("c",), ("no plan",))
    evicted = []
    for number in range(4):
        before = in_host(planner)
        planner.ask([AskedOp(number, ("w", number), PAGE, True)])
        evicted += before - in_host(planner)
    assert evicted == [("no plan",), ("c",), ("a",), ("b",)]
    assert set(planner.entries) == {("a",), ("b",), ("c",), ("no plan",)}, "all are still on disk"


def test_loads_are_in_flight_together_as_far_as_there_are_slots_and_few_before_a_save():
    planner = planner_with(2, *"abc")
    out = planner.ask(reads(*"abc"))
    assert [one.entry.key for one in out] == [("a",), ("b",)]
    first, second = (one.entry for one in out)
    assert offered(planner.loaded(second)) == {1: second.offset}, "each is given when it is there"
    assert offered(planner.loaded(first)) == {0: first.offset}
    assert isinstance(planner.done(0)[0], Load)

    planner = planner_with(50, *range(30))
    begun = moves(planner.ask(reads(*range(30))))
    assert len(begun) == MOST_LOADS
    for load in begun:
        begun += moves(planner.loaded(load.entry))
    assert len(begun) == 30


def test_a_past_use_no_longer_counts():
    planner = planner_with(2)
    planner.follow({("a",): [(1, 0), (4, 8)], ("b",): [(1, 1), (2, 3)]}, 1)
    store(planner, ("a",), ("b",))
    for op in reads("a", "b"):
        planner.ask([op])
        planner.done(op.number)
    planner.ask([AskedOp(5, ("w",), PAGE, True)])
    assert in_host(planner) == {("b",)}
    planner.cancel(5)
    planner.follow(None, 1)
    assert [load.entry.key for load in moves(planner.ask(reads("a", first=6)))] == [("a",)], "followed again from there"


def test_entries_that_the_last_segment_read_stay_until_the_next_one_is_made():
    planner = planner_with(4)
    planner.follow({("a",): [(1, 0)], ("b",): [(1, 1), (2, 2)]}, 0)
    store(planner, ("a",), ("b",), ("other run",))
    for segment, left in ((0, 3), (1, 3), (2, 2), (3, 1)):
        planner.completed(segment)
        assert len(planner.entries) == left
    assert planner.counts["entries_dropped", "dropped"] == 2


def test_every_prefetch_is_counted_by_its_outcome():
    planner = planner_with(4, *"abcde")
    loads = moves(planner.ask(reads(*"abcde", "none")))
    planner.need(1)
    for load in loads[:3]:
        planner.loaded(load.entry)
    (last,) = moves(planner.cancel(2))  # it was loaded: its slot is another's
    assert last.entry.key == ("e",)
    planner.cancel(3)  # it was not loaded yet
    for number in (0, 1):
        planner.done(number)
    planner.loaded(last.entry)
    planner.done(4)
    outcomes = {name[1]: number for name, number in planner.counts.items() if name[0] == "prefetches"}
    assert outcomes == {"useful": 2, "late": 1, "wasted": 1, "cancelled": 1, "unfulfilled": 1}
    assert planner.counts["prefetches_requested",] == 6
    assert planner.counts["prefetch_wasted_bytes",] == PAGE


def test_events_about_ended_ops_change_nothing_and_an_op_without_a_slot_size_is_refused():
    planner = planner_with(1)
    for event in (planner.done, planner.cancel, planner.need, planner.disown):
        assert event(7) == []
    assert offered(planner.ask([AskedOp(8, ("a",), 5 * PAGE, True)])) == {8: None}
    assert planner.counts == {("refusals", "too_large"): 1}


@given(
    host_pages=st.integers(1, 40),
    demand=st.dictionaries(st.integers(1, 9).map(PAGE.__mul__), st.integers(1, 50), min_size=1),
)
def test_the_host_tier_is_divided_without_exceeding_its_bytes(host_pages, demand):
    slots = divide(host_pages * PAGE, demand)
    assert slots.keys() == demand.keys()
    assert all(number >= 1 for number in slots.values())
    if sum(slots) <= host_pages * PAGE:
        assert sum(size * number for size, number in slots.items()) <= host_pages * PAGE
    else:
        assert set(slots.values()) == {1}


def test_the_host_tier_is_divided_by_the_bytes_in_use():
    assert divide(10 * PAGE, {100: 7}) == {PAGE: 10}
    assert divide(12 * PAGE, {PAGE: 6, 3 * PAGE: 2}) == {PAGE: 6, 3 * PAGE: 2}
    assert divide(100 * PAGE, {1: 5, PAGE: 5, 2 * PAGE: 5}) == {PAGE: 50, 2 * PAGE: 25}
    assert divide(10 * PAGE, {PAGE: 100, 5 * PAGE: 1}) == {PAGE: 5, 5 * PAGE: 1}, "the slot of five pages comes first"
    assert divide(1, {PAGE + 1: 3}) == {2 * PAGE: 1}, "every size has a slot"
    assert [slot_bytes(size) for size in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]


def test_slots_count_the_bytes_in_use_and_their_peak():
    slots = Slots({PAGE: 3, 2 * PAGE: 2})
    taken = [(size, slots.take(size)[0]) for size in (PAGE, 2 * PAGE, PAGE, 2 * PAGE, PAGE)]
    assert slots.take(PAGE) == (None, False)
    assert slots.used == slots.peak == 7 * PAGE
    slots.free(*taken[0])
    assert (slots.used, slots.peak) == (6 * PAGE, 7 * PAGE)


@pytest.mark.parametrize("host", [3 * PAGE, 6 * PAGE, 15 * PAGE])
def test_a_plan_that_fits_the_disk_is_served_without_a_miss(host):
    plan = make_reuse_plan("run", 9, window=2, warm_steps=3, experts=["t"] * 5, unit_bytes={"t": [PAGE, 2 * PAGE]})
    counts = simulate(plan, host, plan.needed_bytes)
    assert counts["tier_lookups", "disk", "miss"] == 0
    assert counts["tier_lookups", "host", "hit"] + counts["tier_lookups", "disk", "hit"] == 6 * 12
