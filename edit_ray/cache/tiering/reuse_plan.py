"""The reuse plan: every write and read of residuals that a run's segments will make, listed before they are made.

It follows `policies/warmstart_reuse`. At a warm step a unit reads what the earlier segments of its reuse window have
stored; where they have stored nothing it computes, and stores. So with align="step" and a window of w every (w+1)-th
segment computes its opening, and the w between read it. With align="last" a segment stores the last residual of each
unit, and the next ones read that at each of their warm steps.

A segment reads or writes whatever is alive while it is made: nothing waits meanwhile for a later one. So what a run
keeps at a time is what one segment works on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from edit_ray.cache.tiering.events import Key, Use

Align = Literal["step", "last"]
Combine = Literal["latest", "mean"]


class CacheKey(NamedTuple):
    """The key of an entry inside a run. `slot` is a step index or a name."""

    run: str
    segment: int
    expert: str
    branch: str
    unit: int
    slot: int | str


@dataclass(frozen=True)
class Slot:
    """What each segment may store once and later ones read at `steps`: one residual of `size` bytes."""

    expert: str
    branch: str
    unit: int
    slot: int | str
    size: int
    steps: tuple[int, ...]
    always: bool  # whether a segment that has reused it computes one nevertheless

    def key(self, run: str, segment: int) -> CacheKey:
        return CacheKey(run, segment, self.expert, self.branch, self.unit, self.slot)


@dataclass(frozen=True)
class Planned:
    """One write or read, at a step of its segment."""

    key: CacheKey
    size: int
    step: int


@dataclass(frozen=True)
class SegmentPlan:
    """What one segment writes and reads, each in the order in which it happens."""

    writes: tuple[Planned, ...]
    reads: tuple[Planned, ...]

    @property
    def working(self) -> dict[CacheKey, int]:
        """Every entry that the segment touches, with its bytes: reads in the order of use, then writes."""
        return {planned.key: planned.size for planned in (*self.reads, *self.writes)}


@dataclass(frozen=True)
class ReusePlan:
    """Which segment writes and reads what. `computed` did not fit: every segment computes it, and none stores it."""

    segments: tuple[SegmentPlan, ...]
    computed: tuple[Slot, ...]
    needed_bytes: int  # that the fullest segment would work on if nothing were computed for want of room

    def uses(self) -> dict[Key, list[Use]]:
        """When each entry is read: (segment, order within the run)."""
        uses: dict[Key, list[Use]] = {}
        reads = ((index, read) for index, segment in enumerate(self.segments) for read in segment.reads)
        for order, (index, read) in enumerate(reads):
            uses.setdefault(read.key, []).append((index, order))
        return uses


def make_reuse_plan(
    run: str,
    num_segments: int,
    *,
    window: int,
    warm_steps: int,
    experts: Sequence[str],
    unit_bytes: Mapping[str, Sequence[int]],
    branches: Sequence[str] = ("cond", "uncond"),
    align: Align = "step",
    combine: Combine = "latest",
    budget: int | None = None,
) -> ReusePlan:
    """The plan of a run.

    Where the budget is too small, the smallest residuals are kept, of equal ones those that are used first.

    Args:
        run: The run's id.
        num_segments: How many segments it makes.
        window: How many segments before it each may read.
        warm_steps: How many first steps reuse.
        experts: The expert of each step of the loop.
        unit_bytes: For each expert the bytes of one residual of each unit, of one branch.
        branches: In the order in which a step runs them.
        align: "step" or "last", as of the policy.
        combine: "latest" or "mean", as of the policy: whether a step reads one segment of the window, or all.
        budget: Bytes of the tiers that hold what a segment works on (device and host); None for no bound.

    Raises:
        ValueError: an argument is not valid; says which and what is.
    """
    _check(num_segments, window, warm_steps, experts, unit_bytes, align, combine)
    slots = _slots(warm_steps, experts, unit_bytes, branches, align)
    patterns = {always: _pattern(num_segments, window, always, combine) for always in (False, True)}
    counts = {always: [turn.writes + len(turn.reads) for turn in turns] for always, turns in patterns.items()}
    needed, held, computed = [0] * num_segments, [0] * num_segments, set[Slot]()
    for slot in sorted(slots, key=lambda slot: slot.size):
        with_it = [total + count * slot.size for total, count in zip(held, counts[slot.always], strict=True)]
        needed = [total + count * slot.size for total, count in zip(needed, counts[slot.always], strict=True)]
        if budget is None or max(with_it) <= budget:
            held = with_it
        else:
            computed.add(slot)
    kept = [slot for slot in slots if slot not in computed]
    return ReusePlan(
        tuple(_segment(run, index, kept, patterns) for index in range(num_segments)),
        tuple(slot for slot in slots if slot in computed),
        max(needed),
    )


@dataclass(frozen=True)
class _Turn:
    """What one segment does with a slot: whether it writes it, and whose it reads."""

    writes: bool
    reads: tuple[int, ...]


def _slots(
    warm_steps: int,
    experts: Sequence[str],
    unit_bytes: Mapping[str, Sequence[int]],
    branches: Sequence[str],
    align: Align,
) -> list[Slot]:
    """In the order of their first use."""
    steps: dict[tuple[str, int | str], list[int]] = {}
    for step, expert in enumerate(experts[:warm_steps]):
        steps.setdefault((expert, step if align == "step" else "last"), []).append(step)
    return [
        Slot(expert, branch, unit, name, size, tuple(at), align == "last" and expert in experts[warm_steps:])
        for (expert, name), at in steps.items()
        for branch in branches
        for unit, size in enumerate(unit_bytes[expert])
    ]


def _pattern(num_segments: int, window: int, always: bool, combine: Combine) -> list[_Turn]:
    """What each segment does with one slot; nothing is written that nobody reads."""
    writers: list[int] = []
    reads: list[tuple[int, ...]] = []
    for segment in range(num_segments):
        found = [writer for writer in writers if writer >= segment - window]
        reads.append(tuple(found[-1:] if combine == "latest" else found))
        if always or not found:
            writers.append(segment)
    read = {writer for of_segment in reads for writer in of_segment}
    return [_Turn(segment in read, reads[segment]) for segment in range(num_segments)]


def _segment(run: str, index: int, slots: Sequence[Slot], patterns: Mapping[bool, Sequence[_Turn]]) -> SegmentPlan:
    writes, reads = [], []
    for position, slot in enumerate(slots):
        turn = patterns[slot.always][index]
        if turn.writes:
            # The last residual is not final before the last step; that is later than all warm steps.
            step = slot.steps[0] if isinstance(slot.slot, int) else slot.steps[-1] + 1
            writes.append((step, position, slot.key(run, index), slot.size))
        reads += [(step, position, slot.key(run, writer), slot.size) for step in slot.steps for writer in turn.reads]
    return SegmentPlan(
        *(tuple(Planned(key, size, step) for step, _, key, size in sorted(found)) for found in (writes, reads))
    )


def _check(
    num_segments: int,
    window: int,
    warm_steps: int,
    experts: Sequence[str],
    unit_bytes: Mapping[str, Sequence[int]],
    align: str,
    combine: str,
) -> None:
    for name, value, least in (("num_segments", num_segments, 1), ("window", window, 0), ("warm_steps", warm_steps, 0)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more; got {value}.")
    if align not in ("step", "last"):
        raise ValueError(f"align is {align!r}; valid are 'step' and 'last'.")
    if combine not in ("latest", "mean"):
        raise ValueError(f"combine is {combine!r}; valid are 'latest' and 'mean'.")
    missing = sorted(set(experts) - set(unit_bytes))
    if missing:
        raise ValueError(f"unit_bytes lacks the expert {', '.join(missing)}; it has {', '.join(unit_bytes)}.")
