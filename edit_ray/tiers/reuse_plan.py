"""The reuse plan: every write and read of residuals that a run's segments will make, listed before they are made.

It follows `policies/warmstart_reuse`, aligned by step. At a warm step a unit reads what the earlier segments of its
reuse window have stored at that step; where they have stored nothing it computes, and stores. So with a window of w
every (w+1)-th segment computes its first steps, and the w between read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

Key = tuple[str | int | None, ...]
Use = tuple[int, int]  # the segment that reads, and the order within the whole plan
Uses = Mapping[Key, Sequence[Use]]  # when each entry is read, in order
_PARTS = (str, Integral, type(None))


def check_key(key: Key) -> None:
    """Raises TypeError for what is not a key."""
    wrong = [key] if not isinstance(key, tuple) else [part for part in key if not isinstance(part, _PARTS)]
    if wrong:
        kind = type(wrong[0]).__name__
        raise TypeError(f"A key is a tuple of str, int and None; got {str(key)[:80]}, with {wrong[0]!r}, a {kind}.")


class CacheKey(NamedTuple):
    """The key of an entry inside a run."""

    run: str
    segment: int
    expert: str
    branch: str
    unit: int
    step: int


class Residual(NamedTuple):
    """A residual that segments store and later ones read at the same step: `size` bytes."""

    expert: str
    branch: str
    unit: int
    step: int
    size: int


@dataclass(frozen=True)
class PlannedUse:
    """One write or read, at a step of its segment."""

    key: CacheKey
    size: int
    step: int


@dataclass(frozen=True)
class SegmentUses:
    """The writes and the reads of one segment, each in the order in which they happen."""

    writes: tuple[PlannedUse, ...]
    reads: tuple[PlannedUse, ...]

    @property
    def in_order(self) -> list[tuple[PlannedUse, bool]]:
        """Reads and writes in the order of use, each with whether it writes."""
        uses = [(use, False) for use in self.reads] + [(use, True) for use in self.writes]
        return sorted(uses, key=lambda each: each[0].step)

    @property
    def working(self) -> dict[CacheKey, int]:
        """Bytes of every entry that the segment uses: reads in the order of use, then writes."""
        return {use.key: use.size for use in (*self.reads, *self.writes)}


@dataclass(frozen=True)
class ReusePlan:
    """The writes and reads of each segment. `computed` did not fit: every segment computes it, and none stores it."""

    segments: tuple[SegmentUses, ...]
    computed: tuple[Residual, ...]
    needed_bytes: int  # that the largest segment would use if everything fitted

    def uses(self) -> dict[Key, list[Use]]:
        """The reads of each entry, in order."""
        uses: dict[Key, list[Use]] = {}
        reads = ((index, read) for index, segment in enumerate(self.segments) for read in segment.reads)
        for order, (index, read) in enumerate(reads):
            uses.setdefault(read.key, []).append((index, order))
        return uses

    def demand(self) -> dict[int, int]:
        """The most entries of each size, in bytes, that one segment uses."""
        most: Counter[int] = Counter()
        for segment in self.segments:
            most |= Counter(segment.working.values())
        return dict(most)


def make_reuse_plan(
    run: str,
    num_segments: int,
    *,
    window: int,
    warm_steps: int,
    experts: Sequence[str],
    unit_bytes: Mapping[str, Sequence[int]],
    branches: Sequence[str] = ("cond", "uncond"),
    budget: int | None = None,
) -> ReusePlan:
    """The plan of a run. Where the budget is too small it keeps the smallest residuals, of equal ones the first used.

    Args:
        run: The run's id.
        num_segments: Its number of segments.
        window: The number of earlier segments that each may read.
        warm_steps: The number of first steps that reuse.
        experts: The expert of each step of the loop.
        unit_bytes: For each expert the bytes of one residual of each unit, of one branch.
        branches: In the order in which a step runs them.
        budget: Bytes of the entries that a segment may use; None for no bound.
    """
    residuals = [
        Residual(expert, branch, unit, step, size)
        for step, expert in enumerate(experts[:warm_steps] if window and num_segments > 1 else ())
        for branch in branches
        for unit, size in enumerate(unit_bytes[expert])
    ]
    held, kept = 0, set[Residual]()
    for residual in sorted(residuals, key=lambda residual: residual.size):
        if budget is None or held + residual.size <= budget:
            held += residual.size
            kept.add(residual)
    planned = [residual for residual in residuals if residual in kept]
    return ReusePlan(
        tuple(
            _segment(run, index, index - index % (window + 1), num_segments, planned) for index in range(num_segments)
        ),
        tuple(residual for residual in residuals if residual not in kept),
        sum(residual.size for residual in residuals),
    )


def _segment(run: str, index: int, writer: int, num_segments: int, residuals: Sequence[Residual]) -> SegmentUses:
    """A segment's uses of what `writer` stores; nothing is written that nobody would read."""
    uses = tuple(
        PlannedUse(CacheKey(run, writer, of.expert, of.branch, of.unit, of.step), of.size, of.step) for of in residuals
    )
    if index == writer:
        return SegmentUses(uses if index + 1 < num_segments else (), ())
    return SegmentUses((), uses)
