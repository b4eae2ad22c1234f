"""A reuse plan that works on more than a run's own: each segment reads what the ones before it wrote, and writes."""

from __future__ import annotations

from collections.abc import Sequence

from edit_ray.tiers.reuse_plan import CacheKey, PlannedUse, ReusePlan, SegmentUses


def rolling_plan(
    run: str, num_segments: int, *, window: int, unit_bytes: Sequence[int], warm_steps: int = 1
) -> ReusePlan:
    """At each of the warm steps a segment reads the entries of the `window` segments before it, one of each unit and
    branch; then it writes its own, unless it is the last.
    """

    def uses(segment: int, step: int) -> list[PlannedUse]:
        return [
            PlannedUse(CacheKey(run, segment, "transformer", branch, unit, warm_steps), size, step)
            for branch in ("cond", "uncond")
            for unit, size in enumerate(unit_bytes)
        ]

    segments = []
    for index in range(num_segments):
        before = range(max(0, index - window), index)
        of_step = [list(zip(*(uses(writer, step) for writer in before), strict=True)) for step in range(warm_steps)]
        reads = [use for of_slots in of_step for of_slot in of_slots for use in of_slot]
        writes = uses(index, warm_steps) if index + 1 < num_segments else []
        segments.append(SegmentUses(tuple(writes), tuple(reads)))
    needed = max(sum(segment.working.values()) for segment in segments)
    return ReusePlan(tuple(segments), (), needed)
