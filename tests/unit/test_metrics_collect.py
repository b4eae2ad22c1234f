"""Counters of actors that restart add up to what was really counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.metrics.collect import SUM, ActorMetrics, MetricValues, Snapshot, series
from tests.prometheus import value_of

FRAMES = series("edit_ray_frames_total")
READ = series("edit_ray_reuse_bytes_total", direction="read")


@st.composite
def histories(draw):
    """Snapshots of actors, some of which restart: the counts of an incarnation never go back."""
    snapshots, counts = [], {}
    for actor in draw(st.lists(st.integers(0, 2), max_size=30)):
        incarnation, before = counts.get(actor, (0, {FRAMES: 0, READ: 0}))
        if draw(st.integers(0, 4)) == 0:
            incarnation, before = incarnation + 1, {FRAMES: 0, READ: 0}
        counts[actor] = incarnation, {of: value + draw(st.integers(0, 9)) for of, value in before.items()}
        snapshots.append((actor, Snapshot(f"{incarnation}", counts[actor][1])))
    return snapshots


@given(histories())
def test_each_thing_is_counted_once(snapshots):
    values = MetricValues()
    actors, latest = ActorMetrics(values), {}
    for actor, snapshot in snapshots:
        actors.take("denoiser", actor, snapshot)
        latest[actor, snapshot.incarnation] = snapshot.counts
        assert value_of(values, "edit_ray_frames_total") == sum(counts[FRAMES] for counts in latest.values())
    assert value_of(values, "edit_ray_reuse_bytes_total", direction="read") == sum(of[READ] for of in latest.values())
    restarts = len(latest) - len({actor for actor, _ in latest})
    assert value_of(values, "edit_ray_actor_restarts_total", actor="denoiser") == restarts


def test_gauges_are_those_of_the_newest_snapshot(clock):
    held = series("edit_ray_tier_bytes", tier="host")
    actors = ActorMetrics(MetricValues(), clock)
    for clock.now, (incarnation, value) in enumerate([("1", 20), ("1", 10), ("2", 30)]):
        actors.take("cache_store", 0, Snapshot(incarnation, {}, {held: value}))
        assert actors.gauges()[held] == value
    clock.now += 1
    assert actors.gauges()[series("edit_ray_actor_snapshot_age_seconds", actor="cache_store")] == 1


def test_a_histogram_adds_up():
    values, other = MetricValues(), MetricValues()
    for value in (0.001, 0.005, 0.2, 100):
        values.observe("edit_ray_step_seconds", value, decision="computed")
    ActorMetrics(other).take("denoiser", 0, values.snapshot("1"))
    for bucket, count in {"0.005": 2, "0.25": 1, "+Inf": 1, "0.01": 0}.items():
        assert value_of(other, "edit_ray_step_seconds", bucket, decision="computed") == count
    assert value_of(other, "edit_ray_step_seconds", SUM, decision="computed") == pytest.approx(100.206)


def test_an_unknown_value_of_a_label_counts_as_other():
    totals = MetricValues()
    totals.inc("edit_ray_entries_dropped_total", reason="melted")
    assert value_of(totals, "edit_ray_entries_dropped_total", reason="other") == 1


def test_counters_do_not_go_back():
    with pytest.raises(ValueError, match="only grow"):
        MetricValues().inc("edit_ray_frames_total", -1)
    with pytest.raises(KeyError, match="labels"):
        MetricValues().inc("edit_ray_frames_total", reason="evicted")
    with pytest.raises(KeyError):
        MetricValues().inc("edit_ray_tea_total")
