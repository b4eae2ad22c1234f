"""Metric values: of one process, of the actors from their snapshots, and of runs as the segment scheduler works."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

from edit_ray.metrics.catalog import CATALOG, LABELS, OTHER, Metric, Role

SeriesId = tuple[str, tuple[str, ...], str]
"""A metric, its label values, and a part: "" except in a histogram, where it is `sum` or a bucket's upper bound.

Buckets are not cumulative.
"""
SUM = "sum"
STALE_S = 15.0  # an actor without a snapshot for this long is down


@dataclass(frozen=True)
class Snapshot:
    """The counts of one incarnation of an actor since its start, which never fall, and its gauges."""

    incarnation: str
    counts: Mapping[SeriesId, float] = field(default_factory=dict)
    gauges: Mapping[SeriesId, float] = field(default_factory=dict)


class MetricValues:
    """Counters, histograms and gauges of the catalog in one process. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[SeriesId, float] = {}
        self._gauges: dict[SeriesId, float] = {}

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter. Raises ValueError for a negative amount, KeyError for an unknown metric or label."""
        self.add({series(name, **labels): amount})

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one value to a histogram."""
        self.add(observed(name, value, **labels))

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge; None removes it."""
        of = series(name, **labels)
        with self._lock:
            if value is None:
                self._gauges.pop(of, None)
            else:
                self._gauges[of] = value

    def add(self, increments: Mapping[SeriesId, float]) -> None:
        """Add to many counters at once. Raises ValueError for a negative amount."""
        if min(increments.values(), default=0) < 0:
            raise ValueError(f"counters only grow: {increments}")
        with self._lock:
            for of, amount in increments.items():
                self._counts[of] = self._counts.get(of, 0) + amount

    def snapshot(self, incarnation: str) -> Snapshot:
        """All values at one moment."""
        with self._lock:
            return Snapshot(incarnation, dict(self._counts), dict(self._gauges))


@dataclass
class _Actor:
    heard: float  # time of its latest snapshot, or of the first request
    answers: bool = False
    last: Snapshot | None = None


class ActorMetrics:
    """Adds the counters of actors to `values`, each count once, and keeps the gauges of actors that are not stale.

    A snapshot adds the growth since the one before it: each actor is asked by one task, one request at a time, and runs
    the code of this process.
    """

    def __init__(self, values: MetricValues, clock: Callable[[], float] = time.monotonic) -> None:
        self._values, self._clock = values, clock
        self._actors: dict[tuple[Role, int], _Actor] = {}
        self._lock = threading.Lock()

    def take(self, role: Role, worker: int, snapshot: Snapshot | None) -> None:
        """Take an actor's snapshot; None if it did not answer."""
        with self._lock:
            actor = self._actors.setdefault((role, worker), _Actor(self._clock()))
            actor.answers = snapshot is not None
            if snapshot is None:
                return
            before: Mapping[SeriesId, float] = {}
            if actor.last is not None and actor.last.incarnation == snapshot.incarnation:
                before = actor.last.counts
            elif actor.last is not None:
                self._values.inc("edit_ray_actor_restarts_total", actor=role)
            self._values.add({of: value - before.get(of, 0) for of, value in snapshot.counts.items()})
            actor.heard, actor.last = self._clock(), snapshot

    def gauges(self) -> dict[SeriesId, float]:
        """The gauges of all actors that are not stale, summed, and whether the actors are up."""
        found: dict[SeriesId, float] = defaultdict(float)
        with self._lock:
            for (role, _), actor in self._actors.items():
                age = self._clock() - actor.heard
                for of, value in actor.last.gauges.items() if actor.last is not None and age <= STALE_S else ():
                    found[of] += value
                up = series("edit_ray_actor_up", actor=role)
                found[up] = min(found.get(up, 1.0), float(age <= STALE_S and actor.answers))
                oldest = series("edit_ray_actor_snapshot_age_seconds", actor=role)
                found[oldest] = max(found.get(oldest, 0.0), age)
        return dict(found)


def series(name: str, part: str = "", **labels: str) -> SeriesId:
    """One series; an unknown label value becomes `other`."""
    metric = CATALOG[name]
    if set(labels) != set(metric.labels):
        raise KeyError(f"{name} has the labels {metric.labels}, not {tuple(labels)}")
    known = {label: value if value in (LABELS[label] or (value,)) else OTHER for label, value in labels.items()}
    return name, tuple(known[label] for label in metric.labels), part


def observed(name: str, value: float, **labels: str) -> dict[SeriesId, float]:
    """The increments of one value of a histogram."""
    metric = CATALOG[name]
    bucket = bounds(metric)[bisect_left(metric.buckets, value)]
    return {series(name, bucket, **labels): 1, series(name, SUM, **labels): value}


def bounds(metric: Metric) -> tuple[str, ...]:
    """The upper bounds of a histogram's buckets in Prometheus' notation."""
    return (*map(str, metric.buckets), "+Inf")


MOST_AT_ONCE = 1000  # segments, which take about 15 ms
_STAGE_SECONDS = {"denoise": "denoise_s", "decode": "decode_s", "encode": "encode_s", "commit": "publish_s"}
"""The statistic of a segment that has the seconds of a stage; the other stages belong to no segment."""

_HISTOGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    "seam_score": ("edit_ray_seam_score", {}),
    **{name: ("edit_ray_work_seconds", {"stage": stage}) for stage, name in _STAGE_SECONDS.items()},
}
_LIMIT = 2.0**63  # above every statistic of a segment; sums of smaller values stay finite


class CommittedView(Protocol):
    """What the metrics read of a committed segment (a `SegmentRecord` of the manifest)."""

    @property
    def index(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def statistics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Standing:
    """The state of a live run."""

    state: str
    remaining: int  # planned segments that are not committed
    lag: int  # committed segments that no client has taken


@dataclass
class _Run:
    policy: str
    counted: int
    submitted: float | None


class RunMetrics:
    """Counts committed segments from the lines of the manifest, everything else as it happens.

    So a restarted segment scheduler has the counts of the one before it.
    """

    def __init__(self, values: MetricValues, clock: Callable[[], float] = time.monotonic) -> None:
        self._values, self._clock = values, clock
        self._runs: dict[str, _Run] = {}
        self._work: dict[tuple[str, str, int | None], float] = {}
        self._begun: dict[tuple[str, int | None], float] = {}  # by run and segment: its first work
        self._consumers = 0

    def opened(self, run_id: str, policy: str, counted: int, *, is_new: bool = False) -> None:
        """A run starts or continues; `counted` of its committed segments are counted already."""
        self._runs[run_id] = _Run(policy, counted, self._clock() if is_new else None)
        self._values.set("edit_ray_run_info", 1, run_id=run_id, policy=policy)

    def committed(self, run_id: str, records: Sequence[CommittedView], earlier: Sequence[CommittedView] = ()) -> bool:
        """Count the run's committed segments, and the `earlier` takes they replaced, that were not counted before.

        Counts at most `MOST_AT_ONCE`; returns whether some are left for the next call.
        """
        run = self._runs.get(run_id)
        if run is None:  # its last work ended after the run
            return False
        of, first = (earlier, run.counted) if run.counted < len(earlier) else (records, run.counted - len(earlier))
        if new := of[first : first + MOST_AT_ONCE]:
            run.counted += len(new)
            for record in new:
                self._time(run_id, run, record)
            self._values.add(_counts(new, run.policy))
        return run.counted < len(earlier) + len(records)

    def ended(self, run_id: str, outcome: str) -> None:
        """A run has ended; nothing of it is counted any more."""
        self._values.inc("edit_ray_runs_ended_total", outcome=outcome)
        if (run := self._runs.pop(run_id, None)) is not None:
            self._values.set("edit_ray_run_info", None, run_id=run_id, policy=run.policy)
        self._begun = {of: since for of, since in self._begun.items() if of[0] != run_id}

    def began(self, run_id: str, stage: str, segment_index: int | None) -> None:
        """A work item starts."""
        now = self._work[run_id, stage, segment_index] = self._clock()
        self._begun.setdefault((run_id, segment_index), now)
        self._show_work()

    def finished(self, run_id: str, stage: str, segment_index: int | None, trouble: str | None = None) -> None:
        """A work item ends; `trouble` is why it failed."""
        now = self._clock()
        seconds = max(0.0, now - self._work.pop((run_id, stage, segment_index), now))
        self._show_work()
        if trouble is not None:
            self._values.inc("edit_ray_work_failed_total", stage=stage, trouble=trouble)
            self._values.inc("edit_ray_work_lost_seconds_total", seconds, stage=stage)
        elif stage not in _STAGE_SECONDS:
            self._values.observe("edit_ray_work_seconds", seconds, stage=stage)

    @contextmanager
    def consumer(self) -> Iterator[None]:
        """Count a client that waits for a segment."""
        self._consumers += 1
        self._values.set("edit_ray_stream_consumers", self._consumers)
        try:
            yield
        finally:
            self._consumers -= 1
            self._values.set("edit_ray_stream_consumers", self._consumers)

    def standing(self, runs: Sequence[Standing]) -> None:
        """Set the gauges of all live runs."""
        states = Counter(run.state for run in runs)
        for state in LABELS["state"]:
            self._values.set("edit_ray_runs", states[state], state=state)
        self._values.set("edit_ray_segments_remaining", sum(run.remaining for run in runs))
        self._values.set("edit_ray_stream_lag_segments", max((run.lag for run in runs), default=0))

    def _show_work(self) -> None:
        stages = Counter(stage for _, stage, _ in self._work)
        for stage in LABELS["stage"]:
            self._values.set("edit_ray_work_in_flight", stages[stage], stage=stage)

    def _time(self, run_id: str, run: _Run, record: CommittedView) -> None:
        """Observe the time of a segment, which only the segment scheduler that started it knows."""
        now = self._clock()
        if run.submitted is not None and record.index == 0:
            self._values.observe("edit_ray_first_segment_seconds", max(0.0, now - run.submitted))
        began = self._begun.pop((run_id, record.index), None)
        if began is not None:
            self._values.observe("edit_ray_segment_seconds", max(0.0, now - began))


def _counts(records: Sequence[CommittedView], policy: str) -> Mapping[SeriesId, float]:
    """The increments of committed segments."""
    counters, histograms = _counters(policy), _HISTOGRAMS
    counts: dict[SeriesId, float] = dict.fromkeys(counters.values(), 0.0)
    counts[series("edit_ray_segments_total")] = len(records)
    counts[series("edit_ray_frames_total")] = sum(record.num_frames for record in records)
    for record in records:
        for name, value in record.statistics.items():
            if not 0 <= value < _LIMIT:  # a damaged file may hold any number
                continue
            if (counter := counters.get(name)) is not None:
                counts[counter] += value
            elif (histogram := histograms.get(name)) is not None:
                for of, amount in observed(histogram[0], value, **histogram[1]).items():
                    counts[of] = counts.get(of, 0) + amount
    return counts


def _counters(policy: str) -> dict[str, SeriesId]:
    """The counter of each statistic that is summed."""
    found = {
        "reuse_wait_s": series("edit_ray_reuse_wait_seconds_total"),
        "media_bytes": series("edit_ray_media_bytes_total"),
        "chunks": series("edit_ray_chunks_total"),
        "recache_s": series("edit_ray_recache_seconds_total"),
    }
    for direction in LABELS["direction"]:
        found[f"reuse_{direction}_bytes"] = series("edit_ray_reuse_bytes_total", direction=direction)
    for branch, decision, what in product(LABELS["branch"], LABELS["decision"], ("steps", "units")):
        of = {"policy": policy, "branch": branch, "decision": decision}
        found[f"{what}_{decision}_{branch}"] = series(f"edit_ray_{what}_total", **of)
    return found
