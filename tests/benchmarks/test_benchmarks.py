"""The pure parts of the front's benchmark: likeness, intervals, and which points enter."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import MEASURES, Point, best_at, compare, mean, mean_interval
from benchmarks.methods import METHODS
from benchmarks.policies import Task, in_turns
from benchmarks.shards import Shard, joined


def point(share, *figures, method="m", group="ours"):
    return Point(method, group, {}, share, share, list(figures), [1.0] * len(figures), [share] * len(figures))


def test_a_method_enters_with_its_best_measured_point_and_nothing_between_points():
    points = [point(0.8, 40.0), point(0.51, 35.0), point(0.3, 20.0), point(0.2, 22.0)]
    assert best_at(points, 0.5) is points[3], "a cheaper point may be the better one; 0.51 is above"
    assert best_at(points, 0.51) is points[1]
    assert best_at(points, 0.1) is None
    third = point(1 / 3 + 1e-15, 30.0)
    assert best_at([third], 1 / 3) is third, "a rounding error is no share"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 90)), max_size=8), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_more_blocks_never_make_the_best_point_worse(drawn, one, other):
    points = [point(share, figure) for share, figure in drawn]
    fewer, more = (best_at(points, share) for share in sorted((one, other)))
    assert fewer is None or (more is not None and mean(more.psnr) >= mean(fewer.psnr))


def test_the_difference_is_paired():
    """A constant lead over samples that differ much among themselves is a certain one."""
    peer = [10.0, 50.0, 20.0, 40.0]
    ours = [figure + 1 for figure in peer]
    found = compare([point(0.5, *ours), point(0.5, *peer, group="peer")], 2.0, seeds=2)
    assert found.difference == pytest.approx((1, 1, 1))
    assert compare([point(0.5, *ours)], 2.0, seeds=2).difference is None


def test_the_interval_draws_prompts_with_all_their_seeds():
    assert mean_interval([1.0, 3.0, 0.0, 4.0], seeds=2) == pytest.approx((2, 2, 2)), "both prompts have the mean 2"


def test_the_interval_covers_the_mean_of_a_normal_distribution_about_as_often_as_it_says():
    draws = torch.randn(300, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    intervals = [mean_interval(row.tolist(), seeds=1, resamples=400) for row in draws]
    covered = sum(low <= 0 <= high for _, low, high in intervals)
    assert 0.88 * 300 <= covered <= 0.99 * 300


def test_every_working_peer_has_at_least_as_many_settings_as_ours():
    most = max(len(method.settings) for method in METHODS if method.group == "ours")
    few = [method.name for method in METHODS if method.group == "peer" and len(method.settings) < most]
    assert few == ["diffusers TaylorSeer"], "which hooks nothing, whatever the setting"
    assert all(not any(s in m.settings[:i] for i, s in enumerate(m.settings)) for m in METHODS), "no setting twice"


def test_a_run_cut_short_has_all_methods():
    turns = in_turns(METHODS)
    assert [method.name for method, _ in turns[: len(METHODS)]] == [method.name for method in METHODS]
    assert len(turns) == sum(len(method.settings) for method in METHODS)


def results(shard, prompts=3, seeds=2):
    """What a process would write that measures 10 x prompt + seed everywhere."""
    own = [10.0 * prompt + seed for prompt in range(prompts) if shard.has(prompt) for seed in range(seeds)]
    return {
        "task": {"prompts": ["p"] * prompts, "seeds": seeds},
        "points": [asdict(Point("m", "ours", {"skips": 1}, 0.5, 9.0, shares=own, **dict.fromkeys(MEASURES, own)))],
    }


@pytest.mark.parametrize("of", [1, 2, 3])
def test_shards_join_in_the_order_of_samples_with_times_of_one_alone(of):
    alone = Point("m", "ours", {"skips": 1}, 0.5, 0.6, [1.0], [1.0], [1.0])
    shards = [results(Shard(index, of)) for index in range(of)]
    (found,) = joined(shards, [alone])
    assert found.shares == [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]
    assert {name: getattr(found, name) for name in MEASURES} == dict.fromkeys(MEASURES, found.shares)
    assert (found.time, found.share) == (0.6, 10.5)
    assert joined([*shards[:-1], shards[-1] | {"points": []}], [alone]) == [], "what one lacks is not joined"
    task = Task(["a", "b", "c"], seeds=2)
    parts = [sample for index in range(of) for sample in task.samples(Shard(index, of))]
    assert sorted(parts, key=lambda sample: sample[1]) == list(task.samples())


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "x/2", "0/0"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 (int has words of its own)
        Shard.parse(text)
