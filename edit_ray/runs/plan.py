"""What a run will do, known before it starts: its segments with their prompts and seeds."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.numbers import Count, Seed


@dataclass(frozen=True)
class SegmentPlan:
    """One segment: what to denoise, and which frames of the video it emits."""

    index: int
    take: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int
    first_frame: int
    num_frames: int


@dataclass(frozen=True)
class Scene:
    """What holds from segment `start` on, until the next scene. `seed` is the run's own, or one given here."""

    start: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Take:
    """A re-roll: segments from `start` on are made again with another seed, and with `prompt` where there is one."""

    number: Count
    start: Count
    seed: Seed
    prompt: str | None = None


@dataclass(frozen=True)
class RunPlan:
    """A run as the segment scheduler sees it.

    Args:
        run_id: the run.
        num_segments: how many segments it has; None: it goes on until it is stopped.
        retries: how often one piece of work may fail without ending the run.
        incarnation: of the run; work of an earlier one is nobody's any more.
        max_ahead: how many segments may be denoised beyond what a client has taken; None: any number.
        frames_first: whether a segment is denoised from its predecessor's frames.
    """

    run_id: str
    num_segments: int | None
    retries: int = 0
    incarnation: int = 1
    max_ahead: int | None = None
    frames_first: bool = False


def segment_seed(seed: int, segment_index: int) -> int:
    """The seed of one segment, in [0, 2**63); segment 0 keeps the run's own, so that a run begins like the library."""
    return seed if segment_index == 0 else _derived(f"{seed}:{segment_index}")


def take_seed(seed: int, take: int) -> int:
    """The seed of a re-roll for which none was given, in [0, 2**63)."""
    return _derived(f"{seed}:take:{take}")


def take_of(segment_index: int, takes: Sequence[Take]) -> int:
    """The number of the take that a segment belongs to: the latest that begins at it or before; 0 without any."""
    return next((take.number for take in reversed(takes) if take.start <= segment_index), 0)


@dataclass(frozen=True)
class Storyboard:
    """Every segment of a run, however many there will be. `scenes` are in order and begin with segment 0."""

    scenes: tuple[Scene, ...]
    layout: FrameLayout
    takes: tuple[Take, ...] = ()

    def segment(self, index: int) -> SegmentPlan:
        """What segment `index`, from 0, shows: the scene that holds there, as its newest take has it."""
        scene = self.scenes[bisect_right(self.scenes, index, key=lambda scene: scene.start) - 1]
        seed, prompt = scene.seed, scene.prompt
        for take in self.takes:
            if take.start <= index:
                seed, prompt = take.seed, take.prompt if take.prompt is not None else prompt
        return SegmentPlan(
            index=index,
            take=take_of(index, self.takes),
            prompt=prompt,
            negative_prompt=scene.negative_prompt,
            guidance_scale=scene.guidance_scale,
            seed=segment_seed(seed, index),
            first_frame=self.layout.first_frame(index),
            num_frames=self.layout.frames_of(index),
        )


def _derived(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
