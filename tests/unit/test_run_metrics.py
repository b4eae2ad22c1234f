"""The counts of the segment scheduler: from the manifest, once, and the same after it has died."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.metrics.collect import MOST_AT_ONCE, SUM, MetricValues, RunMetrics, Standing, series
from tests.prometheus import value_of


@dataclass(frozen=True)
class Segment:
    index: int
    num_frames: int = 8
    statistics: dict = field(default_factory=dict)


@pytest.fixture
def totals():
    return MetricValues()


@pytest.fixture
def runs(totals, clock):
    return RunMetrics(totals, clock)


def test_a_segment_counts_when_it_is_committed(runs, totals, clock):
    told = {"denoise_s": 3.0, "steps_skipped_cond": 4, "units_skipped_cond": 8, "units_computed_uncond": 2}
    told |= {"reuse_read_bytes": 100, "reuse_wait_s": 0.25, "media_bytes": 70, "seam_score": 1.5}
    told |= {"chunks": 7, "recache_s": 0.5, "kv_bytes": 4096}
    runs.opened("a", "teacache", 0, is_new=True)
    clock.now = 1.0
    runs.began("a", "denoise", 0)
    assert value_of(totals, "edit_ray_work_in_flight", stage="denoise") == 1
    runs.finished("a", "denoise", 0)
    assert (
        value_of(totals, "edit_ray_segments_total") == value_of(totals, "edit_ray_work_in_flight", stage="denoise") == 0
    )
    clock.now = 5.0
    runs.committed("a", [Segment(0, 8, told)])
    runs.committed("a", [Segment(0, 8, told)])
    of = {"policy": "teacache", "branch": "cond", "decision": "skipped"}
    assert value_of(totals, "edit_ray_segments_total") == 1
    assert value_of(totals, "edit_ray_frames_total") == 8
    assert value_of(totals, "edit_ray_steps_total", **of) == 4
    assert value_of(totals, "edit_ray_units_total", **of) == 8
    assert value_of(totals, "edit_ray_units_total", policy="teacache", branch="uncond", decision="computed") == 2
    assert value_of(totals, "edit_ray_reuse_bytes_total", direction="read") == 100
    assert value_of(totals, "edit_ray_reuse_wait_seconds_total") == 0.25
    assert value_of(totals, "edit_ray_media_bytes_total") == 70
    assert value_of(totals, "edit_ray_chunks_total") == 7
    assert value_of(totals, "edit_ray_recache_seconds_total") == 0.5
    assert value_of(totals, "edit_ray_seam_score", "1.5") == 1
    assert value_of(totals, "edit_ray_work_seconds", SUM, stage="denoise") == 3
    assert value_of(totals, "edit_ray_first_segment_seconds", SUM) == 5
    assert value_of(totals, "edit_ray_segment_seconds", SUM) == 4


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.data())
def test_whenever_the_scheduler_dies_the_counts_are_those_of_the_manifest(commits, data):
    manifest, totals = [], MetricValues()
    runs = RunMetrics(totals)
    runs.opened("a", "none", 0, is_new=True)
    for number in commits:
        manifest += [Segment(len(manifest) + n) for n in range(number)]
        runs.committed("a", manifest)
        if data.draw(st.booleans(), "dies"):
            totals = MetricValues()
            runs = RunMetrics(totals)
            runs.opened("a", "none", 0)
            runs.committed("a", manifest)
    assert value_of(totals, "edit_ray_segments_total") == len(manifest)


def test_what_was_committed_before_a_run_is_resumed_is_not_counted_again(runs, totals):
    old = [Segment(0), Segment(1)]
    runs.opened("a", "none", len(old))
    runs.committed("a", old)
    assert value_of(totals, "edit_ray_segments_total") == 0
    runs.committed("a", [*old, Segment(2)])
    assert value_of(totals, "edit_ray_segments_total") == 1
    assert value_of(totals, "edit_ray_first_segment_seconds", SUM) == 0


def test_a_take_that_replaces_another_counts_beside_it(runs, totals):
    runs.opened("a", "none", 0)
    runs.committed("a", [Segment(0), Segment(1), Segment(2)])
    runs.opened("a", "none", 3)
    earlier = [Segment(1), Segment(2)]
    runs.committed("a", [Segment(0)], earlier)
    runs.committed("a", [Segment(0), Segment(1)], earlier)
    assert value_of(totals, "edit_ray_segments_total") == 4


def test_a_scheduler_that_comes_back_counts_all_takes_once_and_not_too_many_at_a_time(runs, totals):
    earlier, records = [Segment(0, 1)] * (MOST_AT_ONCE + 5), [Segment(k, 1) for k in range(2 * MOST_AT_ONCE)]
    runs.opened("a", "none", 0)
    for counted in (MOST_AT_ONCE, MOST_AT_ONCE + 5, 2 * MOST_AT_ONCE + 5, 3 * MOST_AT_ONCE + 5):
        left = runs.committed("a", records, earlier)
        assert value_of(totals, "edit_ray_frames_total") == value_of(totals, "edit_ray_segments_total") == counted
        assert left == (counted < len(earlier) + len(records))


def test_what_came_to_nothing_is_counted_apart(runs, totals, clock):
    runs.opened("a", "none", 0)
    for trouble, seconds in (("actor_died", 7.0), ("error", 2.0), (None, 1.0)):
        runs.began("a", "denoise", 0)
        clock.now += seconds
        runs.finished("a", "denoise", 0, trouble)
    assert value_of(totals, "edit_ray_work_failed_total", stage="denoise", trouble="actor_died") == 1
    assert value_of(totals, "edit_ray_work_lost_seconds_total", stage="denoise") == 9
    assert value_of(totals, "edit_ray_work_seconds", SUM, stage="denoise") == 0
    runs.began("a", "finalize", None)
    clock.now += 2.5
    runs.finished("a", "finalize", None)
    assert value_of(totals, "edit_ray_work_seconds", SUM, stage="finalize") == 2.5
    clock.now -= 2.5
    runs.committed("a", [Segment(0)])
    assert value_of(totals, "edit_ray_segment_seconds", SUM) == 10  # the viewer waited for all of it


def test_gauges_follow_the_runs(runs, totals):
    runs.standing([Standing("running", 5, 1), Standing("queued", 7, 0)])
    assert value_of(totals, "edit_ray_runs", state="running") == value_of(totals, "edit_ray_runs", state="queued") == 1
    assert value_of(totals, "edit_ray_segments_remaining") == 12
    assert value_of(totals, "edit_ray_stream_lag_segments") == 1
    runs.opened("a", "none", 0)
    assert value_of(totals, "edit_ray_run_info", run_id="a", policy="none") == 1
    runs.ended("a", "failed")
    assert totals.snapshot("").gauges.get(series("edit_ray_run_info", run_id="a", policy="none")) is None
    runs.standing([])
    assert value_of(totals, "edit_ray_runs", state="running") == value_of(totals, "edit_ray_stream_lag_segments") == 0
    assert value_of(totals, "edit_ray_runs_ended_total", outcome="failed") == 1
    with runs.consumer(), runs.consumer():
        assert value_of(totals, "edit_ray_stream_consumers") == 2
    assert value_of(totals, "edit_ray_stream_consumers") == 0
