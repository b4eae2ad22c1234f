"""The reuse plan: what it lists is what a warm start reads and writes, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.policies import WarmstartReuse
from edit_ray.tiers.reuse_plan import CacheKey, make_reuse_plan
from tests.unit.policy_unit import RecordedSignals, Unit

SHAPES = st.fixed_dictionaries(
    {
        "num_segments": st.integers(1, 12),
        "window": st.integers(0, 4),
        "warm_steps": st.integers(0, 4),
        "experts": st.integers(0, 5).map(lambda first: (["transformer"] * first + ["transformer_2"] * 5)[:5]),
        "unit_bytes": st.fixed_dictionaries(
            {name: st.lists(st.integers(1, 9), min_size=1, max_size=3) for name in ("transformer", "transformer_2")}
        ),
        "branches": st.sampled_from([("cond", "uncond"), ("cond",)]),
    }
)


def small(**changes):
    arguments = {
        "window": 2,
        "warm_steps": 1,
        "experts": ["transformer"] * 3,
        "unit_bytes": {"transformer": [10]},
        "branches": ("cond",),
    }
    return make_reuse_plan("run", 5, **(arguments | changes))


def last_reads(plan):
    """The last segment that reads each entry."""
    return {key: uses[-1][0] for key, uses in plan.uses().items()}


def listed(plan):
    """Per segment: which it writes, and which it reads at which step."""
    return [
        ([write.key.segment for write in segment.writes], [(read.step, read.key.segment) for read in segment.reads])
        for segment in plan.segments
    ]


def test_a_segment_beyond_the_window_computes_again():
    assert listed(small()) == [([0], []), ([], [(0, 0)]), ([], [(0, 0)]), ([3], []), ([], [(0, 3)])]
    assert small().segments[1].reads[0].key == CacheKey("run", 0, "transformer", "cond", 0, 0)


def test_order_is_that_of_the_loop():
    plan = small(warm_steps=2, branches=("cond", "uncond"), unit_bytes={"transformer": [10, 20]})
    reads = [(read.step, read.key.branch, read.key.unit) for read in plan.segments[1].reads]
    assert reads == [(step, branch, unit) for step in (0, 1) for branch in ("cond", "uncond") for unit in (0, 1)]


def test_what_does_not_fit_is_computed_and_the_bytes_that_it_lacks_are_said():
    plan = small(warm_steps=2, unit_bytes={"transformer": [30, 10]}, budget=50)
    assert plan.needed_bytes == 80
    assert [(slot.unit, slot.step, slot.size) for slot in plan.computed] == [(0, 1, 30)]
    assert all(sum(segment.working.values()) in (0, 50) for segment in plan.segments)
    assert {read.key[-2:] for segment in plan.segments for read in segment.reads} == {(1, 0), (1, 1), (0, 0)}
    nothing = small(budget=0)
    assert len(nothing.computed) == 1
    assert listed(nothing) == [([], [])] * 5


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, budget=st.one_of(st.none(), st.integers(0, 120)))
def test_every_read_is_written_before_and_every_write_is_read(shape, budget):
    plan = make_reuse_plan("run", **shape, budget=budget)
    written, last_read, sizes = {}, {}, {}
    computed = {(slot.expert, slot.branch, slot.unit, slot.step) for slot in plan.computed}
    for index, segment in enumerate(plan.segments):
        for read in segment.reads:
            assert written[read.key] < index, "by an earlier segment"
            assert index - written[read.key] <= shape["window"]
            assert read.step < shape["warm_steps"]
            assert shape["experts"][read.step] == read.key.expert
            assert read.size == sizes[read.key]
            last_read[read.key] = index
        for write in segment.writes:
            assert write.key.segment == index
            assert write.key not in written
            written[write.key], sizes[write.key] = index, write.size
        for planned in (segment.reads, segment.writes):
            assert [each.step for each in planned] == sorted(each.step for each in planned)
            assert not {each.key[2:] for each in planned} & computed
    assert set(written) == set(last_read), "nothing is written that nobody reads"
    assert last_reads(plan) == last_read
    for index, segment in enumerate(plan.segments):
        alive = {key for key, first in written.items() if first <= index <= last_read[key]}
        assert set(segment.working) == alive, "nothing waits for a later segment"
        assert budget is None or sum(segment.working.values()) <= budget
    orders = sorted((order, position) for uses in plan.uses().values() for position, order in uses)
    assert [order for order, _ in orders] == list(range(len(orders)))
    assert [position for _, position in orders] == sorted(position for _, position in orders)


@settings(max_examples=100, deadline=None)
@given(shape=SHAPES)
def test_the_needed_bytes_are_enough_and_no_fewer_are(shape):
    whole = make_reuse_plan("run", **shape)
    assert whole.computed == ()
    assert make_reuse_plan("run", **shape, budget=whole.needed_bytes) == whole
    if whole.needed_bytes:
        assert make_reuse_plan("run", **shape, budget=whole.needed_bytes - 1).computed


@pytest.mark.parametrize("window", [0, 1, 3])
def test_the_policy_itself_reads_what_was_planned(window):
    """Residuals are their segment in hundreds plus their step, so that an output says where it came from."""
    steps, warm_steps, num_segments = 5, 2, 9
    policy = WarmstartReuse(warm_steps=warm_steps, inner="always")
    plan = make_reuse_plan(
        "run",
        num_segments,
        window=window,
        warm_steps=warm_steps,
        experts=["transformer"] * steps,
        unit_bytes={"transformer": [1]},
        branches=("cond",),
    )
    unit = None
    for segment in range(num_segments):
        earlier = tuple(range(max(0, segment - window), segment))
        unit = Unit(policy, steps, generation=segment, before=unit, window=earlier)
        read = {}
        for step in range(steps):
            seen = RecordedSignals(e=torch.full((1, 2), 1.0 + step))
            done = unit.step(step, signals=seen, output=torch.full((1, 1, 1), 100.0 * segment + step))
            if not done.computed:
                read[step] = divmod(int(done.output.item()), 100)
        assert read == {planned.step: (planned.key.segment, planned.step) for planned in plan.segments[segment].reads}
