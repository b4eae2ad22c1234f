"""The tier planner's rules, each in a plain example: bytes are small numbers, keys are letters."""

import subprocess
import sys
from pathlib import Path

import pytest

from edit_ray.cache import tiering
from edit_ray.cache.tiering.events import (
    Abandon,
    Advance,
    Complete,
    Drop,
    Follow,
    Found,
    Free,
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

ROOT = Path(__file__).resolve().parents[2]


def keys(letters):
    return tuple((letter,) for letter in letters)


class Shell:
    """Carries nothing out: it keeps the moves in flight, until the test says what became of them."""

    def __init__(self, *budgets, eviction="lru", **options):
        names = ("host", "disk") if len(budgets) == 2 else ("device", "host", "disk")
        self.planner = TierPlanner(list(zip(names, budgets, strict=True)), eviction, **options)
        self.counters, self.prefetch = self.planner.counters, self.planner.counters.prefetch
        self.moves, self.granted, self.refused, self.freed, self.number = [], {}, {}, [], 0

    def do(self, event):
        for instruction in self.planner.handle(event):
            match instruction:
                case Move():
                    self.moves.append(instruction)
                case Granted(request):
                    self.granted[request] = instruction
                case Refused(request):
                    self.refused[request] = instruction
                case Free(place):
                    self.freed.append(place)
        self.planner.check()

    def ask(self, make, *args, **kwargs):
        self.number += 1
        self.do(make(self.number, *args, **kwargs))
        return self.number

    def prepare(self, reads="", writes="", size=1):
        return self.ask(Prepare, keys(reads), tuple((key, size) for key in keys(writes)))

    def put(self, letters, size=1):
        """Write, with all moves that it takes, one after the other."""
        for key in keys(letters):
            number = self.ask(Write, key, size)
            self.land()
            self.do(Complete(number))

    def land(self, *letters):
        """These moves succeed, in this order; all, if none is named."""
        while chosen := [move for move in self.moves if not letters or move.source.key[0] in letters]:
            self.moves.remove(chosen[0])
            self.do(Moved(chosen[0].target.ticket))

    def fail(self, failure):
        (move,) = self.moves
        self.moves.clear()
        self.do(MoveFailed(move.target.ticket, failure))

    def in_flight(self):
        return [(move.source.key[0], move.source.tier, move.target.tier) for move in self.moves]

    def where(self, letters):
        places = [self.planner.place(key) for key in keys(letters)]
        return [None if place is None else place.tier for place in places]

    def account(self, tier):
        account = next(account for account in self.planner.tiers.accounts if account.name == tier)
        return account.resident, account.reserved, account.free


# Segments


def test_writes_become_visible_all_at_once():
    shell = Shell(4, None)
    number = shell.prepare(writes="ab")
    assert [place.tier for place in shell.granted[number].writes] == ["host", "host"]
    assert shell.account("host") == (0, 2, 2)
    assert shell.where("ab") == [None, None]
    shell.do(Complete(number))
    assert shell.where("ab") == ["host", "host"]
    assert shell.account("host") == (2, 0, 2)
    assert shell.counters.bytes_into == {"host": 2}


def test_only_what_was_written_is_kept():
    shell = Shell(4, None)
    number = shell.prepare(writes="ab")
    shell.do(Complete(number, written=keys("b")))
    assert shell.where("ab") == [None, "host"]
    assert [place.key for place in shell.freed] == [*keys("a")]


def test_reads_are_brought_from_disk_in_the_order_of_use_and_stay_until_the_segment_ends():
    shell = Shell(2, None)
    shell.put("abcd")
    assert shell.where("abcd") == ["disk", "disk", "host", "host"]
    number = shell.prepare(reads="ba")
    assert shell.in_flight() == [("c", "host", "disk"), ("d", "host", "disk")]
    assert number not in shell.granted
    shell.land("c", "d")
    assert shell.in_flight() == [("b", "disk", "host"), ("a", "disk", "host")]
    shell.land("a")
    assert number not in shell.granted
    shell.land("b")
    assert [(place.key, place.tier) for place in shell.granted[number].reads] == [(key, "host") for key in keys("ba")]
    other = shell.prepare(writes="e")
    assert shell.moves == [], "what is pinned makes no room"
    shell.do(Complete(number))
    assert shell.in_flight() == [("b", "host", "disk")]
    shell.land()
    assert other in shell.granted


def test_a_read_that_is_nowhere_is_a_miss():
    shell = Shell(2, None)
    number = shell.prepare(reads="a", writes="b")
    assert shell.granted[number].reads == (None,)
    assert shell.counters.misses == 1


def test_a_read_of_what_an_earlier_segment_is_writing_waits_for_it():
    shell = Shell(4, None)
    first = shell.prepare(writes="a")
    second, third = shell.prepare(reads="a"), shell.prepare(reads="a")
    assert list(shell.granted) == [first]
    shell.do(Complete(first))
    assert list(shell.granted) == [first, second, third]
    assert shell.granted[second].reads[0].key == ("a",)
    again = shell.prepare(writes="a")
    waiting = shell.prepare(reads="a")
    shell.do(Abandon(again))
    assert again in shell.granted
    assert shell.granted[waiting].reads[0] == shell.granted[second].reads[0], "the old one is still there"


def test_requests_are_granted_in_their_order():
    shell = Shell(3, None)
    first = shell.prepare(writes="ab")
    large, small = shell.prepare(writes="cd"), shell.prepare(writes="e")
    assert list(shell.granted) == [first], "the small one would fit, and waits its turn"
    shell.do(Abandon(first))
    assert list(shell.granted) == [first, large, small]


def test_what_can_never_be_served_is_refused_and_counted():
    shell = Shell(4, None)
    shell.put("ab", size=2)
    number = shell.prepare(reads="ab", writes="c", size=1)
    assert shell.refused[number] == Refused(number, "too_large", "host", 5)
    number = shell.prepare(writes="xyz", size=2)
    assert shell.refused[number] == Refused(number, "too_large", "host", 6)
    assert shell.counters.refusals == {"too_large": 2}
    assert shell.account("host") == (4, 0, 0)


def test_an_entry_larger_than_a_tier_goes_to_the_next_or_nowhere():
    shell = Shell(2, 4)
    number = shell.ask(Prepare, (), ((("small",), 2), (("large",), 3), (("huge",), 5)))
    small, large, huge = shell.granted[number].writes
    assert (small.tier, large.tier, huge) == ("host", "disk", None)
    assert shell.counters.refusals == {"too_large": 1}


def test_what_is_given_up_leaves_nothing():
    shell = Shell(4, None)
    shell.put("a")
    granted = shell.prepare(reads="a", writes="bc")
    waiting = shell.prepare(reads="a", writes="def")
    other = shell.prepare(writes="g")
    shell.do(Abandon(waiting))
    shell.do(Abandon(granted))
    assert other in shell.granted
    assert waiting not in shell.granted
    assert shell.account("host") == (1, 1, 2)
    assert sorted(place.key[0] for place in shell.freed) == ["b", "c"]
    shell.do(Complete(granted))
    assert (shell.counters.stale, shell.where("abc")) == (1, ["host", None, None])


def test_what_was_lifted_for_a_request_that_is_given_up_finds_a_tier():
    shell = Shell(2, 2, staging_bytes=1)
    shell.put("abcd")
    number = shell.prepare(reads="a")
    assert shell.in_flight() == [("a", "disk", "staging")]
    shell.do(Abandon(number))
    shell.land()
    assert number not in shell.granted
    assert sorted(shell.where("abcd")) == ["disk", "disk", "host", "host"]
    assert shell.account("staging") == (0, 0, 1)


def test_stale_events_change_nothing_and_are_counted():
    shell = Shell(1, None)
    shell.put("a")
    number = shell.prepare(writes="b")
    (move,) = shell.moves
    shell.do(Complete(number))
    assert shell.counters.stale == 1, "it waits still"
    shell.land()
    shell.do(Moved(move.target.ticket))
    shell.do(MoveFailed(move.target.ticket, "lost"))
    shell.do(Complete(number))
    shell.do(Complete(number))
    shell.do(Abandon(number))
    shell.do(Need(number))
    shell.do(Abandon(number + 1))
    assert shell.counters.stale == 8 - 1
    assert shell.where("ab") == ["disk", "host"]
    with pytest.raises(ValueError, match=f"{number} came after {number}"):
        shell.planner.handle(Prepare(number))


# Room


def test_swapping_two_full_tiers_needs_somewhere_to_stand():
    shell = Shell(2, 2, staging_bytes=1)
    shell.put("abcd")
    shell.prepare(reads="a")
    assert shell.in_flight() == [("a", "disk", "staging")]
    shell.land("a")
    assert shell.in_flight() == [("c", "host", "disk")]
    shell.land()
    assert shell.where("abcd") == ["host", "disk", "disk", "host"]
    assert shell.counters.drops == {}

    shell = Shell(2, 2)
    shell.put("abcd")
    shell.prepare(reads="a")
    assert shell.where("abcd")[1] is None, "without it something must go"
    assert shell.counters.drops == {"evicted": 1}


def test_what_is_in_flight_is_never_taken_for_room():
    shell = Shell(2, 1)
    shell.put("abc")
    number = shell.prepare(writes="de")
    assert shell.in_flight() == [("b", "host", "disk")], "a has gone, and c must wait until b is there"
    shell.land("b")
    assert shell.in_flight() == [("c", "host", "disk")]
    shell.land("c")
    assert number in shell.granted
    assert shell.where("abc") == [None, None, "disk"]


def test_moves_up_are_bounded_in_flight():
    shell = Shell(4, None, max_loads=2)
    shell.put("abcdefgh")
    number = shell.prepare(reads="abcd")
    shell.land("e", "f", "g", "h")
    assert shell.in_flight() == [("a", "disk", "host"), ("b", "disk", "host")]
    shell.land("b")
    assert shell.in_flight() == [("a", "disk", "host"), ("c", "disk", "host")]
    shell.land()
    assert number in shell.granted


def test_a_large_segment_changes_places_with_another():
    shell, count = Shell(100, None), 100
    for run in "ab":
        number = shell.ask(Prepare, (), tuple(((run, i), 1) for i in range(count)))
        shell.land()
        shell.do(Complete(number))
    number = shell.ask(Prepare, tuple(("a", i) for i in range(count)))
    assert 1 < len(shell.moves) < count, "room is made for some, not for all at once"
    shell.land()
    assert [place.key for place in shell.granted[number].reads] == [("a", i) for i in range(count)]
    assert shell.account("host") == (100, 0, 0)


def test_an_entry_dropped_while_it_is_used_goes_when_it_is_not():
    shell = Shell(2, None)
    shell.put("abc")
    number = shell.prepare(reads="b")
    shell.do(Drop(keys("ab")))
    assert shell.where("ab") == [None, None]
    assert [place.key for place in shell.freed[-1:]] == [*keys("a")]
    assert shell.account("host")[0] == 2
    shell.do(Complete(number))
    assert shell.account("host")[0] == 1
    shell.put("de")
    shell.prepare(reads="c")
    assert shell.in_flight()[0] == ("d", "host", "disk")
    shell.do(Drop(keys("d")))
    assert shell.account("disk") == (1, 1, float("inf"))
    shell.land("d")
    assert shell.account("host")[0] + shell.account("host")[1] == 2
    assert shell.counters.drops == {"dropped": 3}


def test_a_later_write_takes_the_place_of_an_earlier_one():
    shell = Shell(2, None)
    shell.put("a")
    number = shell.prepare(writes="a")
    before = shell.planner.place(("a",))
    shell.do(Complete(number))
    assert shell.planner.place(("a",)) != before
    assert shell.freed == [before]
    assert shell.counters.drops == {"replaced": 1}


def test_what_a_tier_held_before_is_counted_as_far_as_it_fits():
    shell = Shell(2, 3)
    for letter, size in (("a", 2), ("b", 1), ("c", 2), ("d", 4)):
        shell.do(Found((letter,), size, "disk"))
    shell.do(Found(("b",), 1, "disk"))
    assert shell.where("abcd") == [None, "disk", "disk", None]
    assert [place.key[0] for place in shell.freed] == ["a", "d", "b"]
    assert shell.counters.bytes_into == {"disk": 0}


# Failures


def test_a_load_that_failed_is_a_miss():
    for failure, where in (("lost", None), ("transient", "disk"), ("full", "disk")):
        shell = Shell(1, None)
        shell.put("ab")
        number = shell.prepare(reads="a")
        shell.land("b")
        shell.fail(failure)
        assert shell.granted[number].reads == (None,)
        assert shell.where("a") == [where], "an error that may pass costs no entry"
        assert shell.counters.failures == {f"load {failure}": 1}
        assert shell.prefetch.unfulfilled == 1


def test_a_spill_that_failed_loses_the_entry():
    shell = Shell(1, None)
    shell.put("a")
    number = shell.prepare(writes="b")
    shell.fail("transient")
    assert (number in shell.granted, shell.where("a")) == (True, [None])
    assert shell.counters.drops == {"spill_failed": 1}
    assert shell.account("disk")[:2] == (0, 0)


def test_a_full_disk_below_its_budget_gets_one_more_chance():
    shell = Shell(1, 10)
    shell.put("abc")
    number = shell.prepare(writes="d")
    (first,) = shell.moves
    shell.fail("full")
    (second,) = shell.moves
    assert (second.source, second.target.tier) == (first.source, "disk")
    assert second.target.ticket > first.target.ticket
    assert shell.where("abc") == [None, "disk", "host"], "the oldest made room"
    shell.fail("full")
    assert number in shell.granted
    assert shell.where("abc") == [None, "disk", None]
    assert shell.counters.drops == {"evicted": 1, "full": 1}
    assert shell.counters.retries == 1


# Prefetches


def test_each_prefetch_ends_as_one_outcome():
    shell = Shell(2, None)
    shell.put("abcd")
    number = shell.prepare(reads="abx")
    assert (shell.prefetch.requested, shell.prefetch.unfulfilled) == (3, 1)
    shell.land("c", "d", "a")
    shell.do(Need(number))
    shell.land("b")
    shell.do(Complete(number))
    assert (shell.prefetch.useful, shell.prefetch.late, shell.prefetch.open) == (1, 1, 0)

    number = shell.prepare(reads="cd")
    shell.land("a", "b", "c")
    shell.do(Abandon(number))
    assert (shell.prefetch.wasted, shell.prefetch.cancelled, shell.prefetch.open) == (1, 1, 0)
    shell.land()
    assert shell.prefetch.requested == 5
    shell.prepare(reads="c")
    assert shell.prefetch.requested == 5, "what is there already is no prefetch"


def test_a_hint_moves_up_without_a_promise():
    shell = Shell(2, None, staging_bytes=None)
    shell.put("abcd")
    shell.ask(Prefetch, keys("abc"))
    shell.land()
    assert shell.where("abcd") == ["host", "host", "disk", "disk"]
    assert (shell.prefetch.requested, shell.prefetch.unfulfilled, shell.prefetch.open) == (2, 0, 2)
    shell.do(Complete(shell.ask(Read, ("a",))))
    assert shell.prefetch.useful == 1
    shell.put("e")
    assert shell.where("ab") == ["host", "disk"]
    assert (shell.prefetch.wasted, shell.prefetch.open) == (1, 0)
    number = shell.prepare(reads="ae")
    hint = shell.ask(Prefetch, keys("bc"))
    assert shell.prefetch.unfulfilled == 2, "it takes no room from those who have a promise"
    shell.do(Abandon(hint))
    assert (number in shell.granted, shell.counters.stale) == (True, 1)


def test_what_is_dropped_before_its_hint_has_come_true_is_wasted():
    shell = Shell(2, None)
    shell.put("abcd")
    shell.ask(Prefetch, keys("ab"))
    shell.land("c", "d", "a")
    shell.do(Drop(keys("a")))
    shell.land()
    assert (shell.prefetch.requested, shell.prefetch.wasted, shell.prefetch.open) == (2, 1, 1)


def test_what_is_read_before_its_hint_has_come_true_is_late():
    shell = Shell(1, None)
    shell.put("ab")
    shell.ask(Prefetch, keys("a"))
    shell.ask(Read, ("a",))
    shell.land()
    assert (shell.prefetch.requested, shell.prefetch.late) == (1, 1)


# By a plan


def test_what_is_needed_furthest_in_the_future_goes_first():
    shell = Shell(3, None, eviction="furthest_next_use")
    shell.do(Follow({("a",): [(5, 9)], ("b",): [(1, 1)], ("c",): [(3, 4)], ("d",): [(2, 2)]}))
    shell.put("abc")
    shell.prepare(writes="de", size=1)
    assert shell.in_flight() == [("a", "host", "disk"), ("c", "host", "disk")]


def test_what_the_plan_does_not_know_goes_before_what_it_knows():
    shell = Shell(3, None, eviction="furthest_next_use")
    shell.do(Follow({("a",): [(5, 9)]}))
    shell.put("axy")
    shell.do(Complete(shell.ask(Read, ("x",))))
    shell.prepare(writes="de")
    assert shell.in_flight() == [("y", "host", "disk"), ("x", "host", "disk")]


def test_what_nobody_will_read_again_is_dropped_and_never_written_down():
    shell = Shell(2, None, eviction="furthest_next_use")
    shell.do(Follow({("a",): [(1, 0), (2, 2)], ("b",): [(1, 1)]}))
    shell.do(Complete(shell.prepare(writes="ab")))
    shell.do(Advance(1))
    number = shell.prepare(reads="ab")
    assert shell.where("ab") == ["host", "host"]
    shell.do(Complete(number))
    assert shell.where("ab") == ["host", None]
    shell.do(Advance(3))
    assert shell.where("a") == [None], "passed over"
    assert shell.counters.drops == {"dead": 2}
    assert shell.counters.spills == 0


def test_a_write_that_would_be_the_first_to_go_is_placed_lower_or_not_at_all():
    shell = Shell(1, 1, eviction="furthest_next_use")
    shell.do(Follow({(letter,): [(position, position)] for position, letter in enumerate("abc", start=1)}))
    shell.put("abc")
    assert shell.where("abc") == ["host", "disk", None]
    assert (shell.counters.spills, shell.counters.unkept) == (0, 1)


def test_after_a_read_that_was_not_planned_the_least_recently_used_goes_first():
    shell = Shell(2, None, eviction="furthest_next_use")
    shell.do(Follow({("a",): [(1, 0)], ("b",): [(5, 1)]}))
    shell.put("ab")
    shell.do(Complete(shell.ask(Read, ("b",))))
    assert shell.planner.eviction.diverged
    shell.prepare(writes="c")
    assert shell.in_flight() == [("a", "host", "disk")]
    shell.do(Follow({("a",): [(1, 0)], ("b",): [(5, 1)]}))
    shell.prepare(writes="d")
    shell.land()
    assert shell.where("ab") == ["disk", "disk"]


def test_a_planner_that_makes_no_sense_is_refused():
    for tiers, message in (
        ([], "The tiers are none"),
        ([("host", 1), ("host", 2)], "The tiers are host, host"),
        ([("staging", 1)], "not 'staging'"),
        ([("host", -1)], "'host' must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            TierPlanner(tiers)
    with pytest.raises(ValueError, match="max_loads must be 1 or more"):
        TierPlanner([("host", 1)], max_loads=0)


def test_the_package_loads_nothing_but_the_standard_library():
    folder = Path(tiering.__file__).parent
    names = [f"edit_ray.cache.tiering.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "loaded = {name.partition('.')[0] for name, module in sys.modules.items() if getattr(module, '__file__', '')}\n"
        "print(sorted(loaded - sys.stdlib_module_names - {'edit_ray', 'sitecustomize'}))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
