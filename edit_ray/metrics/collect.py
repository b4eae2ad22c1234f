"""Metric values: those of one process, and those that actors report in snapshots."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edit_ray.metrics.catalog import CATALOG, LABELS, OTHER, Metric, Role

SeriesId = tuple[str, tuple[str, ...], str]
"""A metric, the values of its labels, and the part: "" except in a histogram.

A histogram's parts are `sum` and its buckets, each named by its upper bound and not cumulative.
"""
SUM = "sum"
STALE_S = 15.0  # without a snapshot for as long an actor is down


@dataclass(frozen=True)
class Snapshot:
    """What one incarnation of an actor has counted since its start; later snapshots have a higher `sequence`."""

    incarnation: str
    sequence: int
    counts: Mapping[SeriesId, float] = field(default_factory=dict)
    gauges: Mapping[SeriesId, float] = field(default_factory=dict)


class MetricValues:
    """Counters, histograms and gauges of the catalog in one process. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[SeriesId, float] = {}
        self._gauges: dict[SeriesId, float] = {}
        self._sequence = 0

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count. Raises ValueError for a negative amount, KeyError for a metric or label that the catalog lacks."""
        self.add({series(name, **labels): amount})

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count one value of a histogram."""
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
        """Count many at once. Raises ValueError for a negative amount."""
        if min(increments.values(), default=0) < 0:
            raise ValueError(f"counters only grow: {increments}")
        with self._lock:
            for of, amount in increments.items():
                self._counts[of] = self._counts.get(of, 0) + amount

    def value(self, name: str, part: str = "", **labels: str) -> float:
        """What was counted or set, 0 if nothing."""
        of = series(name, part, **labels)
        with self._lock:
            return self._gauges.get(of, self._counts.get(of, 0))

    def snapshot(self, incarnation: str) -> Snapshot:
        """All values at one moment."""
        with self._lock:
            self._sequence += 1
            return Snapshot(incarnation, self._sequence, dict(self._counts), dict(self._gauges))


@dataclass
class _Actor:
    role: Role
    heard: float  # when its latest snapshot came, or when one was first expected
    answers: bool = False
    incarnations: dict[str, Snapshot] = field(default_factory=dict)  # the last known snapshot of each, newest last
    gauges: dict[SeriesId, float] = field(default_factory=dict)


class ActorMetrics:
    """Adds the counters of actors to `values`, each count once, and holds the gauges of those that are not stale.

    A counter of an incarnation never falls. So a snapshot adds what it has beyond the last one of its incarnation, and
    one that arrives twice, or after a later one, adds nothing.
    """

    def __init__(self, values: MetricValues, clock: Callable[[], float] = time.monotonic) -> None:
        self._values, self._clock = values, clock
        self._actors: dict[tuple[Role, int], _Actor] = {}
        self._lock = threading.Lock()

    def take(self, role: Role, worker: int, snapshot: Snapshot | None) -> None:
        """An actor's answer to the request for a snapshot; None if it did not answer."""
        with self._lock:
            actor = self._actors.setdefault((role, worker), _Actor(role, self._clock()))
            actor.answers = snapshot is not None
            if snapshot is None:
                return
            last = actor.incarnations.get(snapshot.incarnation)
            if last is not None and snapshot.sequence <= last.sequence:
                return
            before = {} if last is None else last.counts
            grown = {of: max(0.0, value - before.get(of, 0)) for of, value in snapshot.counts.items()}
            if last is None and actor.incarnations:
                grown[series("edit_ray_actor_restarts_total", actor=role)] = 1
            self._values.add(known_series(grown))
            actor.incarnations[snapshot.incarnation] = snapshot
            if snapshot.incarnation == next(reversed(actor.incarnations)):
                actor.heard, actor.gauges = self._clock(), known_series(snapshot.gauges)

    def gauges(self) -> dict[SeriesId, float]:
        """The sum of the gauges of all actors that are not stale, and whether the actors are up."""
        found: dict[SeriesId, float] = defaultdict(float)
        with self._lock:
            for actor in self._actors.values():
                age = self._clock() - actor.heard
                for of, value in actor.gauges.items() if age <= STALE_S else ():
                    found[of] += value
                up = series("edit_ray_actor_up", actor=actor.role)
                found[up] = min(found.get(up, 1.0), float(age <= STALE_S and actor.answers))
                oldest = series("edit_ray_actor_snapshot_age_seconds", actor=actor.role)
                found[oldest] = max(found.get(oldest, 0.0), age)
        return dict(found)


def series(name: str, part: str = "", **labels: str) -> SeriesId:
    """One series; a value that its label does not have becomes `other`."""
    metric = CATALOG[name]
    if set(labels) != set(metric.labels):
        raise KeyError(f"{name} has the labels {metric.labels}, not {tuple(labels)}")
    return name, tuple(_known(label, str(labels[label])) for label in metric.labels), part


def observed(name: str, value: float, **labels: str) -> dict[SeriesId, float]:
    """What one value adds to a histogram."""
    metric = CATALOG[name]
    bucket = bounds(metric)[bisect_left(metric.buckets, value)]
    return {series(name, bucket, **labels): 1, series(name, SUM, **labels): value}


def known_series(values: Mapping[SeriesId, float]) -> dict[SeriesId, float]:
    """Series of a process that may run other code: what the catalog lacks is dropped, or counted under `other`."""
    known: dict[SeriesId, float] = {}
    for (name, labels, part), value in values.items():
        metric = CATALOG.get(name)
        if metric is None or len(labels) != len(metric.labels):
            continue
        if part in ((*bounds(metric), SUM) if metric.kind == "histogram" else ("",)):
            of = (name, tuple(map(_known, metric.labels, labels)), part)
            known[of] = known.get(of, 0) + value
    return known


def bounds(metric: Metric) -> tuple[str, ...]:
    """The upper bounds of a histogram's buckets as Prometheus writes them."""
    return (*map(str, metric.buckets), "+Inf")


def _known(label: str, value: str) -> str:
    values = LABELS[label]
    return value if not values or value in values else OTHER
