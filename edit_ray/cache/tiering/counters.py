"""What a planner has done, in numbers that add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edit_ray.cache.tiering.events import DropReason, Refusal

Outcome = Literal["useful", "late", "wasted", "unfulfilled", "cancelled"]
Cause = Literal["eviction", "prefetch", "demand"]
"""Why an entry moves: others take its place, it will be read, it is waited for."""


@dataclass
class Prefetches:
    """Entries asked for ahead of their use that were not in place then; each ends as exactly one of the five.

    Requested are those that end so, and those that are `open`.
    """

    requested: int = 0
    useful: int = 0  # in place when it was needed
    late: int = 0  # came, but was waited for
    wasted: int = 0  # came, and left or was given up before it was read
    unfulfilled: int = 0  # there was no such entry, no room for it, or the way failed
    cancelled: int = 0  # given up before it came
    wasted_bytes: int = 0

    @property
    def open(self) -> int:
        """Those without an outcome yet."""
        return self.requested - self.useful - self.late - self.wasted - self.unfulfilled - self.cancelled

    def end(self, outcome: Outcome, count: int = 1) -> None:
        setattr(self, outcome, getattr(self, outcome) + count)


@dataclass
class Counters:
    """`stored` entries became visible; they are in a tier or in `drops`."""

    stored: int = 0
    spills: int = 0  # moves one or more tiers down
    stale: int = 0  # events about a request or a place that is gone, or not there yet
    retries: int = 0  # spills tried again after the tier was full below its budget
    misses: int = 0  # reads that found nothing
    found: dict[str, int] = field(default_factory=dict)  # other reads, by the tier that had it when it was asked for
    unkept: int = 0  # writes that were not worth a place in any tier
    prefetch: Prefetches = field(default_factory=Prefetches)
    drops: dict[DropReason, int] = field(default_factory=dict)
    refusals: dict[Refusal, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)  # of moves, "load" or "spill" and why
    bytes_into: dict[str, int] = field(default_factory=dict)  # written into each tier, by moves and by writers
    moves: dict[tuple[str, str, Cause], tuple[int, int]] = field(default_factory=dict)  # from, to: entries, bytes

    def drop(self, reason: DropReason) -> None:
        self.drops[reason] = self.drops.get(reason, 0) + 1

    def refuse(self, reason: Refusal) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def fail(self, what: str) -> None:
        self.failures[what] = self.failures.get(what, 0) + 1

    def find(self, tier: str) -> None:
        self.found[tier] = self.found.get(tier, 0) + 1

    def moved(self, source: str, target: str, cause: Cause, size: int) -> None:
        entries, total = self.moves.get((source, target, cause), (0, 0))
        self.moves[source, target, cause] = (entries + 1, total + size)

    def wrote(self, tier: str, size: int) -> None:
        self.bytes_into[tier] = self.bytes_into.get(tier, 0) + size
