"""Random histories of the tier planner: reads get what was written last, nothing waits for ever or counts twice."""

from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edit_ray.metrics.catalog import CATALOG, LABELS
from edit_ray.tiers.planner import MOST_LOADS, AskedOp, Give, Load, Remove, Save, TierPlanner
from edit_ray.tiers.reuse_plan import make_reuse_plan
from edit_ray.tiers.slots import PAGE, Slots, TierEntry, divide, slot_bytes

SIZES = (PAGE, 3 * PAGE)
KEYS = st.integers(0, 5)


def size_of(key):
    return SIZES[key[0] % 2]


class Histories(RuleBasedStateMachine):
    """Memory and disk on paper: what lies in each slot and in each file is the version that was written."""

    fired: Counter[str]  # given by the test

    @initialize(slots=st.tuples(st.integers(1, 3), st.integers(1, 3)), disk=st.sampled_from([None, 4, 6]), old=KEYS)
    def begin(self, slots, disk, old):
        found = [((old,), size_of((old,)))]
        bound = None if disk is None else disk * PAGE
        self.planner = TierPlanner(dict(zip(SIZES, slots, strict=True)), bound, found)
        self.memory, self.files = {}, {(old,): "old"}  # offset -> what lies there; key -> version
        self.latest = {(old,): "old"}  # what a read may find, at most
        self.moving = {}  # ticket -> instruction
        self.ops, self.given, self.disowned = {}, {}, set()  # number -> the op; number -> its offset
        self.saving = {}  # key -> ticket of the save that may publish it
        self.number = 0

    def act(self, instructions):
        for instruction in instructions:
            match instruction:
                case Give(number, None):
                    assert not self.ops[number].writes, "a write has a slot"
                    self.check_order(number)
                    self.finish(number)
                case Give(number, offset):
                    op = self.ops[number]
                    end = offset + op.size
                    self.check_order(number)
                    for other, at in self.given.items():
                        alike = at == offset and not op.writes and self.ops[other].key == op.key
                        apart = at + self.ops[other].size <= offset or end <= at
                        assert alike or apart, "two ops write to one place"
                    self.given[number] = offset
                    if not op.writes:
                        assert self.memory[offset] == (op.key, self.latest[op.key]), "a wrong entry"
                        self.fired["read"] += 1
                case Load(ticket, key, offset, _):
                    assert key in self.files, "nothing to load"
                    assert offset not in self.given.values(), "loaded over what is in use"
                    self.moving[ticket] = instruction
                    self.memory[offset] = "being loaded"
                case Save(ticket, number, key, offset):
                    self.moving[ticket], self.saving[key] = instruction, ticket
                case Remove(key):
                    self.files.pop(key, None)
                    self.latest.pop(key, None)
                    self.saving.pop(key, None)

    def check_order(self, number):
        """A read comes after every earlier write of its key that may still be made."""
        op = self.ops[number]
        before = [self.ops[other] for other in self.ops if other < number and other not in self.disowned]
        assert op.writes or all(other.key != op.key or not other.writes for other in before), "a read has overtaken"

    def finish(self, number):
        self.given.pop(number, None)
        del self.ops[number]

    @rule(wanted=st.lists(st.tuples(KEYS, st.sampled_from([False, False, True])), min_size=1, max_size=6))
    def ask(self, wanted):
        asked = []
        for key, writes in wanted:
            self.number += 1
            asked.append(AskedOp(self.number, (key,), size_of((key,)), writes))
        self.ops |= {op.number: op for op in asked}
        self.act(self.planner.ask(asked))

    @rule(number=st.integers(1, 6), moves=st.sampled_from([False, None, "bad", "worse"]))
    def go_on(self, number, moves):
        """Several ops, and what is in flight."""
        for _ in range(number):
            self.done(0)
            if moves is not False:
                self.end_of_a_move(0, moves)

    @rule(which=st.integers(0, 9))
    def done(self, which):
        if self.given:
            number = sorted(self.given)[which % len(self.given)]
            op, offset = self.ops[number], self.given[number]
            if op.writes:
                self.memory[offset] = (op.key, number)
            instructions = self.planner.done(number)
            self.finish(number)
            if op.writes:
                if op.key in self.latest:  # the first Remove is that of what it replaces
                    instructions.remove(Remove(op.key))
                    self.act([Remove(op.key)])
                self.latest[op.key] = number
                self.fired["write"] += 1
            self.act(instructions)

    @rule(which=st.integers(0, 9), disowned=st.booleans())
    def cancel(self, which, disowned):
        if self.ops:
            number = sorted(self.ops)[which % len(self.ops)]
            if disowned:
                self.disowned.add(number)
                self.act(self.planner.disown(number))
            given = self.given.pop(number, None)
            del self.ops[number]
            self.act(self.planner.cancel(number))
            self.fired["cancel, given" if given is not None else "cancel, waiting"] += 1

    @rule(which=st.integers(0, 9))
    def need(self, which):
        waiting = sorted(set(self.ops) - set(self.given))
        if waiting:
            self.act(self.planner.need(waiting[which % len(waiting)]))

    @rule(which=st.integers(0, 9), failure=st.sampled_from([None, None, "bad", "worse"]))
    def end_of_a_move(self, which, failure):
        if not self.moving:
            return
        ticket = sorted(self.moving)[which % len(self.moving)]
        move = self.moving.pop(ticket)
        if isinstance(move, Save):
            reason = None if failure != "worse" else "full" if ticket % 2 else "spill_failed"
            published = reason is None and self.saving.get(move.key) == ticket
            if published:
                self.files[move.key] = self.latest[move.key]
            self.act(self.planner.saved(ticket, reason))
            self.fired["saved" if published else "not saved"] += 1
        else:
            there = move.key in self.files
            failure = "lost" if not there or failure == "worse" else "transient" if failure else None
            if failure == "lost":
                self.files.pop(move.key, None)
            if failure is None:
                self.memory[move.offset] = (move.key, self.files[move.key])
            self.act(self.planner.loaded(ticket, failure))
            self.fired[f"load {failure}"] += 1

    @rule(keys=st.lists(KEYS, max_size=1))
    def drop(self, keys):
        self.act(self.planner.drop([(key,) for key in keys]))
        assert not {(key,) for key in keys} & set(self.planner.entries)

    @rule(uses=st.lists(st.tuples(st.integers(0, 4), KEYS), max_size=10), segment=st.integers(0, 4))
    def follow(self, uses, segment):
        plan = {}
        for order, (position, key) in enumerate(sorted(uses)):
            plan.setdefault((key,), []).append((position, order))
        self.act(self.planner.follow(plan, segment))
        for key in self.planner.entries:
            assert key not in plan or plan[key][-1][0] >= segment, "nobody reads it"

    @rule(segment=st.integers(0, 4))
    def completed(self, segment):
        self.act(self.planner.completed(segment))

    @invariant()
    def all_adds_up(self):
        if hasattr(self, "planner"):
            self.planner.check()
            assert set(self.planner.entries) == set(self.latest), "what can be read is what was written and not dropped"

    def teardown(self):
        """Whatever is in line is served once moves and ops end."""
        if not hasattr(self, "planner"):
            return
        for _ in range(1000):
            if not self.moving and not self.given:
                break
            self.go_on(1, None)
        assert not self.ops, "an op waits for ever"
        assert self.planner.open_prefetches == 0
        self.fired["evicted"] += self.planner.counts["tier_moves", "host", "disk", "eviction"]
        for name, *labels in self.planner.counts:
            metric = CATALOG[f"edit_ray_{name}_total"]
            assert all(value in LABELS[label] for label, value in zip(metric.labels, labels, strict=True))
        self.planner.drop(list(self.planner.entries))
        assert (self.planner.slots.used, self.planner.disk_used) == (0, 0)


def run_histories(number, shrinks=True):
    fired = Counter()
    kind = type("Machine", (Histories,), {"fired": fired})
    options = {"max_examples": number, "stateful_step_count": 40, "deadline": None, "database": None}
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]
    kind.TestCase.settings = settings(**options, derandomize=True, phases=phases)
    kind.TestCase("runTest").runTest()
    return fired


EVERYTHING = {"read", "write", "cancel, given", "cancel, waiting", "saved", "not saved"}
EVERYTHING |= {"load None", "load lost", "load transient", "evicted"}


def test_histories():
    fired = run_histories(400)
    print(fired)
    assert set(fired) == EVERYTHING


@pytest.mark.slow
def test_20000_histories():
    assert set(run_histories(20_000)) == EVERYTHING


MUTANTS = {
    "a read does not wait for its writer": ("_awaits_writer", lambda self, asked: False),
    "what is gone keeps its slot": ("_settle", lambda self, entry: None),
    "what is saved is not known to be": ("saved", lambda self, ticket, failure=None: self._saving.pop(ticket) and []),
    "the disk has no bound": ("_keep_disk_bound", lambda self: None),
    "a prefetch ends twice": (
        "_end_prefetch",
        lambda self, op, outcome: self.counts.update({("prefetches", outcome): int(op.asked.writes is False)}),
    ),
    "what is loading is given at once": (
        "_load",
        lambda self, op, entry: setattr(entry, "offset", self._take(entry.size)) or entry.offset is not None,
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planner_that_is_wrong_fails(mutant, monkeypatch):
    name, broken = MUTANTS[mutant]
    monkeypatch.setattr(TierPlanner, name, broken)
    with pytest.raises(Exception):  # noqa: B017, PT011 - an assertion, or whatever follows from a wrong state
        run_histories(150, shrinks=False)


def test_what_is_in_use_is_never_evicted(monkeypatch):
    monkeypatch.setattr(TierEntry, "evictable", property(lambda entry: entry.offset is not None and not entry.gone))
    with pytest.raises(AssertionError):
        run_histories(150, shrinks=False)


# What is chosen, in small


def given(instructions):
    return {one.number: one.offset for one in instructions if isinstance(one, Give)}


def stored(planner, *keys):
    """Entries of one page that were written, and are on disk."""
    for number, key in enumerate(keys, start=1000):
        planner.ask([AskedOp(number, key, PAGE, True)])
        (save,) = [one for one in planner.done(number) if isinstance(one, Save)]
        planner.saved(save.ticket)


def in_host(planner):
    return {key for key, entry in planner.entries.items() if entry.offset is not None}


def test_what_is_read_furthest_in_the_future_is_evicted_and_before_it_what_nobody_reads():
    planner = TierPlanner({PAGE: 4})
    planner.follow({("a",): [(1, 2)], ("b",): [(1, 0), (3, 9)], ("c",): [(2, 5)]}, 0)
    stored(planner, ("a",), ("b",), ("c",), ("no plan",))
    evicted = []
    for number in range(4):
        before = in_host(planner)
        planner.ask([AskedOp(number, ("w", number), PAGE, True)])
        evicted += before - in_host(planner)
    assert evicted == [("no plan",), ("c",), ("a",), ("b",)]
    assert set(planner.entries) == {("a",), ("b",), ("c",), ("no plan",)}, "all are still on disk"


def test_reads_are_loaded_at_the_same_time_as_far_as_there_are_slots():
    planner = TierPlanner({PAGE: 2}, found=[((name,), PAGE) for name in "abc"])
    out = planner.ask([AskedOp(number, (name,), PAGE, False) for number, name in enumerate("abc")])
    assert [one.key for one in out] == [("a",), ("b",)]
    assert given(planner.loaded(out[1].ticket)) == {1: out[1].offset}, "each is given when it is there"
    assert given(planner.loaded(out[0].ticket)) == {0: out[0].offset}
    assert isinstance(planner.done(0)[0], Load)


def test_saves_wait_behind_few_loads():
    planner = TierPlanner({PAGE: 50}, found=[((name,), PAGE) for name in range(30)])
    loads = planner.ask([AskedOp(number, (number,), PAGE, False) for number in range(30)])
    assert len(loads) == MOST_LOADS
    begun = [load.ticket for load in loads]
    for ticket in begun:
        begun += [one.ticket for one in planner.loaded(ticket) if isinstance(one, Load)]
    assert len(begun) == 30


def test_a_use_that_is_over_counts_no_more():
    planner = TierPlanner({PAGE: 2})
    planner.follow({("a",): [(1, 0), (4, 8)], ("b",): [(1, 1), (2, 3)]}, 1)
    stored(planner, ("a",), ("b",))
    for number, name in enumerate("ab"):
        planner.ask([AskedOp(number, (name,), PAGE, False)])
        planner.done(number)
    planner.ask([AskedOp(5, ("w",), PAGE, True)])
    assert in_host(planner) == {("b",)}
    planner.cancel(5)
    planner.rewind(1)
    planner.ask([AskedOp(6, ("a",), PAGE, False)])
    assert planner.entries[("a",)].loading, "the plan is followed again from there"


def test_what_the_last_segment_read_stays_until_the_next_one_is_made():
    planner = TierPlanner({PAGE: 4})
    planner.follow({("a",): [(1, 0)], ("b",): [(1, 1), (2, 2)]}, 0)
    stored(planner, ("a",), ("b",), ("other run",))
    for segment, left in ((0, 3), (1, 3), (2, 2), (3, 1)):
        planner.completed(segment)
        assert len(planner.entries) == left
    assert planner.counts["entries_dropped", "dropped"] == 2


def test_prefetches_end_as_they_are_counted():
    planner = TierPlanner({PAGE: 4}, found=[((name,), PAGE) for name in "abcde"])
    wanted = [*"abcde", "none"]
    loads = planner.ask([AskedOp(number, (name,), PAGE, False) for number, name in enumerate(wanted)])
    planner.need(1)
    for load in loads[:3]:
        planner.loaded(load.ticket)
    (last,) = [one for one in planner.cancel(2) if isinstance(one, Load)]  # which was there: its slot is another's
    assert last.key == ("e",)
    planner.cancel(3)  # which was not there yet
    for number in (0, 1):
        planner.done(number)
    planner.loaded(last.ticket)
    planner.done(4)
    outcomes = {name[1]: number for name, number in planner.counts.items() if name[0] == "prefetches"}
    assert outcomes == {"useful": 2, "late": 1, "wasted": 1, "cancelled": 1, "unfulfilled": 1}
    assert planner.counts["prefetches_requested",] == 6
    assert planner.counts["prefetch_wasted_bytes",] == PAGE


def test_what_is_stale_is_counted_and_changes_nothing():
    planner = TierPlanner({PAGE: 1})
    for event in (planner.done, planner.cancel, planner.need, planner.disown, planner.loaded, planner.saved):
        assert event(7) == []
    assert planner.counts["refusals", "stale_event"] == 6
    assert given(planner.ask([AskedOp(8, ("a",), 5 * PAGE, True)])) == {8: None}
    assert planner.counts["refusals", "too_large"] == 1


def test_a_host_tier_is_shared_out_by_the_bytes_that_are_in_use():
    assert divide(10 * PAGE, {100: 7}) == {PAGE: 10}
    assert divide(12 * PAGE, {PAGE: 6, 3 * PAGE: 2}) == {PAGE: 6, 3 * PAGE: 2}
    assert divide(100 * PAGE, {1: 5, PAGE: 5, 2 * PAGE: 5}) == {PAGE: 50, 2 * PAGE: 25}
    assert divide(1, {PAGE + 1: 3}) == {2 * PAGE: 1}, "every size has a slot"
    assert [slot_bytes(size) for size in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]


def test_slots_of_two_sizes_do_not_overlap():
    slots = Slots({PAGE: 3, 2 * PAGE: 2})
    taken = [(slots.take(size)[0], size) for size in (PAGE, 2 * PAGE, PAGE, 2 * PAGE, PAGE)]
    slots.check(taken)
    assert slots.take(PAGE) == (None, None)
    assert slots.used == slots.peak == 7 * PAGE
    slots.free(*reversed(taken[0]))
    assert slots.used == 6 * PAGE


def test_a_plan_that_fits_the_disk_is_served_without_a_miss():
    """And the disk never holds more than one segment works on."""
    plan = make_reuse_plan("run", 9, window=2, warm_steps=3, experts=["t"] * 5, unit_bytes={"t": [PAGE, 2 * PAGE]})
    for host in (1, 2, 5):
        planner = TierPlanner({PAGE: host, 2 * PAGE: host}, plan.needed_bytes)
        planner.follow(plan.uses(), 0)
        number, waiting = 0, {}
        for index, segment in enumerate(plan.segments):
            for use, writes in [*((use, False) for use in segment.reads), *((use, True) for use in segment.writes)]:
                number += 1
                out = planner.ask([AskedOp(number, use.key, use.size, writes)])
                while number not in given(out):
                    waiting |= {one.ticket: one for one in out if isinstance(one, Load | Save)}
                    ticket, move = waiting.popitem()
                    out = planner.loaded(ticket) if isinstance(move, Load) else planner.saved(ticket)
                assert given(out)[number] is not None
                out = planner.done(number)
                waiting |= {one.ticket: one for one in out if isinstance(one, Load | Save)}
            planner.completed(index)
        assert planner.counts["tier_lookups", "disk", "miss"] == 0
        assert planner.disk_peak == plan.needed_bytes
