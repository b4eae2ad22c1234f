"""What the actors have said of themselves, and what of it still holds."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from edit_ray.metrics.catalog import Role
from edit_ray.metrics.deltas import Deltas
from edit_ray.metrics.totals import Series, Snapshot, Totals, from_elsewhere, series

STALE_S = 15.0


@dataclass
class _Actor:
    role: Role
    heard: float  # when it was heard of last, or expected first
    answers: bool = False
    gauges: dict[Series, float] = field(default_factory=dict)


class ActorSnapshots:
    """Adds snapshots of actors up in `totals`, and keeps the gauges of those that go on sending some.

    An actor whose last snapshot is older than `STALE_S` is down, and what it said of itself is no longer told.
    """

    def __init__(self, totals: Totals, clock: Callable[[], float] = time.monotonic) -> None:
        self._totals, self._clock = totals, clock
        self._deltas = Deltas()
        self._actors: dict[tuple[Role, int], _Actor] = {}
        self._lock = threading.Lock()

    def take(self, role: Role, worker: int, snapshot: Snapshot | None) -> None:
        """The answer of an actor that was asked for a snapshot; None: it has not answered."""
        with self._lock:
            actor = self._actors.setdefault((role, worker), _Actor(role, self._clock()))
            actor.answers = snapshot is not None
            if snapshot is None:
                return
            name, known = f"{role}/{worker}", self._deltas.restarts(f"{role}/{worker}")
            self._totals.add(from_elsewhere(self._deltas.take(name, snapshot)))
            self._totals.inc("edit_ray_actor_restarts_total", self._deltas.restarts(name) - known, actor=role)
            if self._deltas.is_latest(name, snapshot):
                actor.heard, actor.gauges = self._clock(), from_elsewhere(snapshot.gauges)

    def gauges(self) -> dict[Series, float]:
        """The gauges of all actors that are not stale, added up, and how the actors are."""
        with self._lock:
            actors = [(actor, self._clock() - actor.heard) for actor in self._actors.values()]
        found: dict[Series, float] = defaultdict(float)
        for actor, age in actors:
            fresh = age <= STALE_S
            for of, value in actor.gauges.items() if fresh else ():
                found[of] += value
            up = series("edit_ray_actor_up", actor=actor.role)
            found[up] = min(found.get(up, 1.0), float(fresh and actor.answers))
            oldest = series("edit_ray_actor_snapshot_age_seconds", actor=actor.role)
            found[oldest] = max(found.get(oldest, 0.0), age)
        return dict(found)
