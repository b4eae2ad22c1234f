"""How snapshots of actors become counts: each thing once, whatever restarts, arrives twice or arrives late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edit_ray.metrics.totals import Series, Snapshot


@dataclass
class _Incarnation:
    sequence: int = -1
    counts: Mapping[Series, float] = field(default_factory=dict)


class Deltas:
    """What each snapshot adds to what is known of its actor.

    A counter of an incarnation never goes back. A snapshot that comes later than one of a higher sequence adds nothing,
    as that one holds all that it holds; one of an earlier incarnation still adds what only it tells.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, _Incarnation]] = {}

    def take(self, actor: str, snapshot: Snapshot) -> dict[Series, float]:
        """The increments by which the snapshot goes beyond what was known of the actor's incarnation."""
        known = self._known.setdefault(actor, {}).setdefault(snapshot.incarnation, _Incarnation())
        if snapshot.sequence <= known.sequence:
            return {}
        before = known.counts
        known.sequence, known.counts = snapshot.sequence, snapshot.counts
        grown = {of: value - before.get(of, 0) for of, value in snapshot.counts.items()}
        return {of: more for of, more in grown.items() if more > 0}

    def is_latest(self, actor: str, snapshot: Snapshot) -> bool:
        """Whether none that was taken of the actor is newer; of incarnations the one that was heard of last is."""
        incarnations = self._known.get(actor, {})
        known = incarnations.get(snapshot.incarnation)
        return known is not None and known.sequence == snapshot.sequence and known is list(incarnations.values())[-1]

    def restarts(self, actor: str) -> int:
        """Incarnations of the actor beyond the first."""
        return max(0, len(self._known.get(actor, {})) - 1)
