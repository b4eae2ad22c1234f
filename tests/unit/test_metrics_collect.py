"""Counters of actors that restart, repeat themselves and are late add up to what was really counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.metrics.collect import SUM, ActorMetrics, MetricValues, Snapshot, known_series, series

FRAMES = series("edit_ray_frames_total")
READ = series("edit_ray_reuse_bytes_total", direction="read")


@st.composite
def histories(draw):
    """Per actor and incarnation the counts at each of its snapshots, which never go back."""
    snapshots = []
    for actor in draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
        for incarnation in range(draw(st.integers(1, 4))):
            counts = {FRAMES: 0, READ: 0}
            for sequence in range(draw(st.integers(1, 5))):
                counts = {of: value + draw(st.integers(0, 9)) for of, value in counts.items()}
                snapshots.append((actor, Snapshot(f"{incarnation}", sequence, counts)))
    return snapshots


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@given(histories(), st.data())
def test_each_thing_is_counted_once(snapshots, data):
    heard = data.draw(st.lists(st.sampled_from(snapshots), max_size=30))  # any order, some twice, some never
    values, last = MetricValues(), 0.0
    actors = ActorMetrics(values)
    for actor, snapshot in heard:
        actors.take("denoiser", ord(actor), snapshot)
        assert values.value("edit_ray_frames_total") >= last
        last = values.value("edit_ray_frames_total")
    most = {}
    for actor, snapshot in heard:
        known = most.setdefault((actor, snapshot.incarnation), snapshot)
        if snapshot.sequence > known.sequence:
            most[actor, snapshot.incarnation] = snapshot
    assert last == sum(snapshot.counts[FRAMES] for snapshot in most.values())
    assert values.value("edit_ray_reuse_bytes_total", direction="read") == sum(s.counts[READ] for s in most.values())
    restarts = len(most) - len({actor for actor, _ in most})
    assert values.value("edit_ray_actor_restarts_total", actor="denoiser") == restarts


def test_gauges_are_those_of_the_newest_snapshot_of_the_last_incarnation():
    held, clock = series("edit_ray_tier_bytes", tier="host"), Clock()
    actors = ActorMetrics(MetricValues(), clock)
    told = [("1", 2, 20, 20), ("1", 1, 10, 20), ("2", 1, 30, 30), ("1", 3, 40, 30)]
    for clock.now, (incarnation, sequence, value, expected) in enumerate(told):
        actors.take("cache_store", 0, Snapshot(incarnation, sequence, {}, {held: value}))
        assert actors.gauges()[held] == expected
    assert actors.gauges()[series("edit_ray_actor_snapshot_age_seconds", actor="cache_store")] == 1


def test_a_histogram_adds_up():
    values, other = MetricValues(), MetricValues()
    for value in (0.001, 0.005, 0.2, 100):
        values.observe("edit_ray_step_seconds", value, decision="computed")
    ActorMetrics(other).take("denoiser", 0, values.snapshot("1"))
    for bucket, count in {"0.005": 2, "0.25": 1, "+Inf": 1, "0.01": 0}.items():
        assert other.value("edit_ray_step_seconds", bucket, decision="computed") == count
    assert other.value("edit_ray_step_seconds", SUM, decision="computed") == pytest.approx(100.206)


def test_what_a_newer_actor_says_counts_under_other():
    new_label = ("edit_ray_entries_dropped_total", ("melted",), "")
    says = {new_label: 2, ("edit_ray_entries_dropped_total", ("burnt",), ""): 1, ("edit_ray_tea_total", (), ""): 5}
    says |= {("edit_ray_frames_total", ("cond",), ""): 1, ("edit_ray_step_seconds", ("computed",), "7.5"): 1}
    says |= {("edit_ray_frames_total", (), "sum"): 1}
    assert known_series(says) == {("edit_ray_entries_dropped_total", ("other",), ""): 3}
    totals = MetricValues()
    totals.inc("edit_ray_entries_dropped_total", reason="melted")
    assert totals.value("edit_ray_entries_dropped_total", reason="other") == 1


def test_counters_do_not_go_back():
    with pytest.raises(ValueError, match="only grow"):
        MetricValues().inc("edit_ray_frames_total", -1)
    with pytest.raises(KeyError, match="labels"):
        MetricValues().inc("edit_ray_frames_total", reason="evicted")
    with pytest.raises(KeyError):
        MetricValues().inc("edit_ray_tea_total")
