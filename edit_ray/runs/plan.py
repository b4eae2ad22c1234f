"""What a run will do, known before it starts: its segments with their prompts and seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from edit_ray.runs.layout import FrameLayout


@dataclass(frozen=True)
class SegmentPlan:
    """One segment: what to denoise, and which frames of the video it emits."""

    index: int
    prompt: str
    seed: int
    first_frame: int
    num_frames: int


@dataclass(frozen=True)
class RunPlan:
    """A whole run; `retries` is how often one segment (or the preparation) may fail without ending the run."""

    run_id: str
    segments: tuple[SegmentPlan, ...]
    retries: int = 0

    @property
    def num_frames(self) -> int:
        return sum(segment.num_frames for segment in self.segments)


def segment_seed(seed: int, segment_index: int) -> int:
    """The seed of one segment, in [0, 2**63); segment 0 keeps the run's own, so that a run begins like the library."""
    if segment_index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{segment_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def plan_run(run_id: str, *, prompts: Sequence[str], seed: int, layout: FrameLayout, retries: int) -> RunPlan:
    """One `SegmentPlan` per prompt (one prompt per segment, in order)."""
    segments = tuple(
        SegmentPlan(
            index=index,
            prompt=prompt,
            seed=segment_seed(seed, index),
            first_frame=layout.first_frame(index),
            num_frames=layout.frames_of(index),
        )
        for index, prompt in enumerate(prompts)
    )
    return RunPlan(run_id=run_id, segments=segments, retries=retries)
