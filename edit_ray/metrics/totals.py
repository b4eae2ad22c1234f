"""The values of all metrics in one process, and snapshots of them that other processes add up."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from edit_ray.metrics.catalog import CATALOG, LABELS, OTHER, Metric

Series = tuple[str, tuple[str, ...], str]
"""A metric, the values of its labels, and the part of it: "" but for histograms, of which each bucket, named by its
upper bound, and `sum` are counted by themselves.
"""
SUM = "sum"


@dataclass(frozen=True)
class Snapshot:
    """What one incarnation of an actor has counted since its beginning; later ones have a higher `sequence`."""

    incarnation: str
    sequence: int
    counts: Mapping[Series, float] = field(default_factory=dict)
    gauges: Mapping[Series, float] = field(default_factory=dict)


class Totals:
    """Counters, histograms and gauges of the catalog. Any thread may call; nobody is kept waiting for long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Series, float] = {}
        self._gauges: dict[Series, float] = {}
        self._sequence = 0

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count. Raises ValueError for less than nothing, KeyError for a metric or label that the catalog lacks."""
        self.add({series(name, **labels): amount})

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count one value of a histogram."""
        self.add(observed(name, value, **labels))

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge; None takes it away."""
        of = series(name, **labels)
        with self._lock:
            if value is None:
                self._gauges.pop(of, None)
            else:
                self._gauges[of] = value

    def add(self, increments: Mapping[Series, float]) -> None:
        """Count many at once."""
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


def series(name: str, part: str = "", **labels: str) -> Series:
    """One series; a value that its label does not have is `other`."""
    metric = CATALOG[name]
    if set(labels) != set(metric.labels):
        raise KeyError(f"{name} has the labels {metric.labels}, not {tuple(labels)}")
    return name, tuple(_known(label, str(labels[label])) for label in metric.labels), part


def observed(name: str, value: float, **labels: str) -> dict[Series, float]:
    """What one value adds to a histogram."""
    return {series(name, bucket_of(CATALOG[name], value), **labels): 1, series(name, SUM, **labels): value}


def from_elsewhere(values: Mapping[Series, float]) -> dict[Series, float]:
    """Series of a process that may run other code: what the catalog lacks is left out, or counted under `other`."""
    known: dict[Series, float] = {}
    for (name, labels, part), value in values.items():
        metric = CATALOG.get(name)
        if metric is None or len(labels) != len(metric.labels):
            continue
        if metric.kind == "histogram" and part != SUM:
            if part not in bounds(metric):
                continue
        elif metric.kind != "histogram" and part:
            continue
        of = (name, tuple(map(_known, metric.labels, labels)), part)
        known[of] = known.get(of, 0) + value
    return known


def bounds(metric: Metric) -> tuple[str, ...]:
    """The upper bounds of a histogram's buckets as Prometheus writes them."""
    return (*map(str, metric.buckets), "+Inf")


def bucket_of(metric: Metric, value: float) -> str:
    """The bucket that counts a value."""
    return bounds(metric)[bisect_left(metric.buckets, value)]


def _known(label: str, value: str) -> str:
    values = LABELS[label]
    return value if not values or value in values else OTHER
