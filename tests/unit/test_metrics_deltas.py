"""Counters of actors that restart, repeat themselves and are late add up to what was really counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.metrics.deltas import Deltas
from edit_ray.metrics.totals import SUM, Snapshot, Totals, from_elsewhere, series

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


@given(histories(), st.data())
def test_each_thing_is_counted_once(snapshots, data):
    heard = data.draw(st.lists(st.sampled_from(snapshots), max_size=30))  # any order, some twice, some never
    deltas, totals, last = Deltas(), Totals(), 0.0
    for actor, snapshot in heard:
        totals.add(deltas.take(actor, snapshot))
        assert totals.value("edit_ray_frames_total") >= last
        last = totals.value("edit_ray_frames_total")
    most = {}
    for actor, snapshot in heard:
        known = most.setdefault((actor, snapshot.incarnation), snapshot)
        if snapshot.sequence > known.sequence:
            most[actor, snapshot.incarnation] = snapshot
    assert last == sum(snapshot.counts[FRAMES] for snapshot in most.values())
    assert totals.value("edit_ray_reuse_bytes_total", direction="read") == sum(s.counts[READ] for s in most.values())
    for actor in {actor for actor, _ in heard}:
        assert deltas.restarts(actor) == len({s.incarnation for a, s in heard if a == actor}) - 1


def test_only_the_newest_snapshot_of_the_last_incarnation_is_the_latest():
    deltas = Deltas()
    first, second, next_life = Snapshot("1", 1), Snapshot("1", 2), Snapshot("2", 1)
    assert not deltas.is_latest("a", first)
    for snapshot, latest in [(second, True), (first, False), (next_life, True), (second, False)]:
        deltas.take("a", snapshot)
        assert deltas.is_latest("a", snapshot) == latest


def test_a_histogram_adds_up():
    totals, other = Totals(), Totals()
    for value in (0.001, 0.005, 0.2, 100):
        totals.observe("edit_ray_step_seconds", value, decision="computed")
    other.add(Deltas().take("a", totals.snapshot("1")))
    for bucket, count in {"0.005": 2, "0.25": 1, "+Inf": 1, "0.01": 0}.items():
        assert other.value("edit_ray_step_seconds", bucket, decision="computed") == count
    assert other.value("edit_ray_step_seconds", SUM, decision="computed") == pytest.approx(100.206)


def test_what_a_newer_actor_says_counts_under_other():
    new_label = ("edit_ray_entries_dropped_total", ("melted",), "")
    says = {new_label: 2, ("edit_ray_entries_dropped_total", ("burnt",), ""): 1, ("edit_ray_tea_total", (), ""): 5}
    says |= {("edit_ray_frames_total", ("cond",), ""): 1, ("edit_ray_step_seconds", ("computed",), "7.5"): 1}
    says |= {("edit_ray_frames_total", (), "sum"): 1}
    assert from_elsewhere(says) == {("edit_ray_entries_dropped_total", ("other",), ""): 3}
    totals = Totals()
    totals.inc("edit_ray_entries_dropped_total", reason="melted")
    assert totals.value("edit_ray_entries_dropped_total", reason="other") == 1


def test_counters_do_not_go_back():
    with pytest.raises(ValueError, match="only grow"):
        Totals().inc("edit_ray_frames_total", -1)
    with pytest.raises(KeyError, match="labels"):
        Totals().inc("edit_ray_frames_total", reason="evicted")
    with pytest.raises(KeyError):
        Totals().inc("edit_ray_tea_total")
