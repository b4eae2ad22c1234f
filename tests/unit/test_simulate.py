"""What the planner gets out of five access traces, against figures measured with another simulator; and the bound."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.stores.simulate import Access, accesses_of, offline_bound, simulate
from edit_ray.tiers.reuse_plan import make_reuse_plan

TIERS = (("device", 384), ("host", 768), ("disk", 2304))  # budgets in MB, as all sizes here


def sizes(count: int, low: int, high: int) -> list[int]:
    draw = random.Random(7)
    return [round(math.exp(draw.uniform(math.log(low), math.log(high)))) for _ in range(count)]


def cyclic(entries: int) -> list[Access]:
    """Thirty generations, each of which reads the same entries in the same order."""
    size = sizes(entries, 60, 140)
    return [Access(generation, (i,), size[i], 1.0) for generation in range(30) for i in range(entries)]


def windowed(window: int) -> list[Access]:
    """180 segments of 24 units, each of which reads, and at first computes, its own entry and those of the window."""
    size = sizes(24, 10, 400)
    return [
        Access(segment, (earlier, unit), size[unit], 1.0)
        for segment in range(180)
        for unit in range(24)
        for earlier in range(max(0, segment - window), segment + 1)
    ]


# Hit rate in any tier, hit rate above the disk, GB written to the disk.
MEASURED = {
    "cyclic, 30 entries": (cyclic(30), (0.967, 0.000, 76.6), (0.967, 0.451, 42.3)),
    "cyclic, 40 entries": (cyclic(40), (0.024, 0.000, 101.9), (0.967, 0.338, 66.8)),
    "cyclic, 55 entries": (cyclic(55), (0.000, 0.000, 145.3), (0.703, 0.246, 108.7)),
    "windowed, 1 back": (windowed(1), (0.002, 0.000, 698.8), (0.499, 0.436, 167.0)),
    "windowed, 3 back": (windowed(3), (0.001, 0.000, 1390.5), (0.510, 0.261, 834.9)),
}


def figures(accesses, eviction):
    result = simulate(accesses, TIERS, eviction)
    above = (result.hits["device"] + result.hits["host"]) / result.reads
    return result, (round(result.hit_rate, 3), round(above, 3), round(result.bytes_written["disk"] / 1000, 1))


@pytest.mark.parametrize("trace", MEASURED)
def test_the_furthest_next_use_is_as_good_as_was_measured_and_wears_the_disk_no_more(trace):
    accesses, _, (hit_rate, above_disk, disk_gb) = MEASURED[trace]
    result, found = figures(accesses, "furthest_next_use")
    print(f"{trace}: {found}, {result.ratio:.3f} of the bound")
    assert found[0] >= hit_rate
    assert found[1] >= above_disk
    assert found[2] <= disk_gb
    assert result.saved_seconds <= result.bound_seconds * (1 + 1e-9)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("trace", MEASURED)
def test_the_least_recently_used_is_what_was_measured(trace):
    accesses, measured, _ = MEASURED[trace]
    assert figures(accesses, "lru")[1] == measured


def test_seconds_and_bytes_are_added_up():
    accesses = [Access(0, ("a",), 10, 5.0, write=True), *(Access(1, (name,), 10, 5.0) for name in "aba")]
    result = simulate(accesses, [("host", 10), ("disk", None)], "lru", {("disk", "host"): 4.0})
    assert (result.reads, dict(result.hits)) == (3, {"host": 1, "disk": 1})
    assert (result.stall_seconds, result.recompute_seconds, result.saved_seconds) == (2.5, 5.0, 10.0)
    assert result.bytes_written == {"host": 30, "disk": 20}
    assert result.ratio == 1.0


def test_a_reuse_plan_that_fits_is_served_without_a_miss():
    plan = make_reuse_plan(
        "run", 9, window=2, warm_steps=3, experts=["transformer"] * 5, unit_bytes={"transformer": [3, 4]}
    )
    accesses = accesses_of(plan, lambda key: 2.0)
    result = simulate(accesses, [("host", plan.needed_bytes)], "furthest_next_use")
    assert result.hit_rate == 1.0
    assert result.recompute_seconds == 0.0
    assert result.reads == sum(len(segment.reads) for segment in plan.segments) > 0
    too_small = simulate(accesses, [("host", plan.needed_bytes - 4)], "furthest_next_use")
    assert 0 < too_small.hit_rate < 1


def best_saving(accesses, capacity):
    """By trying every choice of what to keep between the accesses of a key."""
    last, intervals = {}, []
    for i, access in enumerate(accesses):
        if access.key in last:
            intervals.append((last[access.key], i, access))
        last[access.key] = i
    best = 0.0
    for chosen in itertools.product([False, True], repeat=len(intervals)):
        kept = [interval for interval, keep in zip(intervals, chosen, strict=True) if keep]
        held = [sum(access.size for first, end, access in kept if first <= i < end) for i in range(len(accesses))]
        if max(held, default=0) <= capacity:
            best = max(best, sum(access.seconds for *_, access in kept))
    return best


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    seconds=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    keys=st.lists(st.integers(0, 2), max_size=9),
    budgets=st.lists(st.integers(1, 5), min_size=1, max_size=2),
)
def test_no_choice_of_victims_beats_the_bound(sizes, seconds, keys, budgets):
    accesses = [Access(i, (key,), sizes[key], float(seconds[key])) for i, key in enumerate(keys)]
    bound = offline_bound(accesses, sum(budgets))
    assert best_saving(accesses, sum(budgets)) <= bound + 1e-9
    for eviction in ("lru", "furthest_next_use"):
        result = simulate(accesses, [(str(i), budget) for i, budget in enumerate(budgets)], eviction)
        assert result.saved_seconds <= bound + 1e-9
        assert result.saved_seconds + result.recompute_seconds == sum(access.seconds for access in accesses)
