"""What a run will make, known before it starts: its segments, with their frames, prompts and seeds."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from edit_ray.runs.ids import Count, Seed

TEMPORAL_FACTOR = 4
"""Frames per latent; the first latent of a clip stands for a single frame."""

Switch = Literal["recache", "keep", "cut"]
"""What a causal model sees of earlier chunks where a prompt begins: all with this one, each with its own, or none."""

_ROUNDING = 1e-6
"""Tolerance, in frames, for the binary rounding of seconds times frames a second."""


@dataclass(frozen=True)
class FrameLayout:
    """The frames that each segment adds to the video.

    Args:
        num_frames: frames that a segment denoises, F = 4k+1.
        history_latents: latents a segment takes over from its predecessor, 0 where segments stand alone. With k of
            T latents taken over, a later segment adds 4·(T − k) frames; with none every segment adds F.
        fps: frames a second.
        init_latents: latents of the user's picture or clip that segment 0 continues; they are not part of the video.
        denoise_needs_frames: whether a segment is denoised from its predecessor's frames.
        causal: whether segments continue one stream and take nothing over, so that a later one adds 4·T frames.

    Raises:
        ValueError: a number out of its range.
    """

    num_frames: Count
    history_latents: Count
    fps: float
    init_latents: Count = 0
    denoise_needs_frames: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.num_frames % TEMPORAL_FACTOR != 1:
            raise ValueError(f"num_frames is {self.num_frames}; it must be 4k+1, such as 33 or 81.")
        for name in ("history_latents", "init_latents"):
            if not 0 <= getattr(self, name) < self.latent_frames:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 and less than the "
                    f"{self.latent_frames} latents of a segment of {self.num_frames} frames."
                )
        if not 1 <= self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}; it must be at least 1 and at most 1000.")

    @property
    def latent_frames(self) -> int:
        """Latents of one segment along time, T."""
        return (self.num_frames - 1) // TEMPORAL_FACTOR + 1

    @property
    def one_stream(self) -> bool:
        """Whether the latents of all segments are one clip, with one decoder."""
        return self.causal or self.history_latents > 0

    def frames_of(self, segment_index: int) -> int:
        """Frames that the segment adds to the video."""
        _check_index(segment_index)
        taken_over = self.init_latents if segment_index == 0 else self.history_latents
        continues = taken_over > 0 or (self.causal and segment_index > 0)
        return TEMPORAL_FACTOR * (self.latent_frames - taken_over) if continues else self.num_frames

    def first_frame(self, segment_index: int) -> int:
        """Index in the video of the first frame that the segment adds."""
        return self.total_frames(segment_index)

    def first_latent(self, segment_index: int) -> int:
        """Index in the run's latent stream of the first latent that the segment adds."""
        _check_index(segment_index)
        later = self.latent_frames - self.history_latents
        return self.init_latents if segment_index == 0 else self.latent_frames + (segment_index - 1) * later

    def total_frames(self, num_segments: int) -> int:
        """Frames of a video of that many segments."""
        _check_index(num_segments)
        return self.frames_of(0) + (num_segments - 1) * self.frames_of(1) if num_segments else 0

    def segments_for(self, duration_s: float) -> int:
        """The fewest segments, at least one, whose frames last `duration_s` seconds."""
        frames = math.ceil(duration_s * self.fps - _ROUNDING)
        return 1 + max(0, math.ceil((frames - self.frames_of(0)) / self.frames_of(1)))

    def frame_at(self, second: float) -> int:
        """Index of the frame that is shown at that second."""
        return math.floor(second * self.fps + _ROUNDING)

    def segment_at(self, second: float) -> int:
        """Index of the segment that adds the frame shown at that second."""
        if second < 0:
            raise ValueError(f"second is {second}; it must be at least 0.")
        return max(0, 1 + (self.frame_at(second) - self.frames_of(0)) // self.frames_of(1))


@dataclass(frozen=True)
class Pictures:
    """The files of the pictures that a segment is conditioned on: its first and last frame, and what it should show."""

    image: str | None = None
    last_image: str | None = None
    reference_images: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """The paths that are set, in that order."""
        return [path for path in (self.image, self.last_image, *self.reference_images) if path is not None]


NO_PICTURES = Pictures()


@dataclass(frozen=True)
class SegmentPlan:
    """One segment: what to denoise, and which frames of the video it adds."""

    index: int
    take: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int
    first_frame: int
    num_frames: int
    lora_weights: Mapping[str, float] = field(default_factory=dict)
    pictures: Pictures = NO_PICTURES


@dataclass(frozen=True)
class Scene:
    """The settings from segment `start` on, until the next scene. `seed` is the run's own, or one of the scene.

    `cuts`: its first segment begins with its picture where others continue the segment before. `switch` is for causal
    models.
    """

    start: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int
    lora_weights: Mapping[str, float] = field(default_factory=dict)
    pictures: Pictures = NO_PICTURES
    cuts: bool = False
    switch: Switch = "recache"


@dataclass(frozen=True)
class Take:
    """A re-roll: segments from `start` on are made again with another seed, and with `prompt` where there is one."""

    number: Count
    start: Count
    seed: Seed
    prompt: str | None = None


EDITABLE = ("prompt", "negative_prompt", "guidance_scale", "seed")
"""What of a scene an edit or a take may change."""


@dataclass(frozen=True)
class Edit:
    """From segment `start` on, what is not None here holds in place of what the storyboard has there.

    `request` identifies the request that it was made for, so that a client can repeat it.
    """

    start: Count
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Seed | None = None
    request: str = ""


Change = Take | Edit


@dataclass(frozen=True)
class RunPlan:
    """A run as the segment scheduler sees it.

    Args:
        run_id: the run.
        num_segments: how many segments it has; None: it continues until it is stopped.
        retries: how often one piece of work may fail without ending the run.
        incarnation: of the run; work of an earlier one is ignored.
        max_ahead: how many segments may be denoised beyond what a client has consumed; None: any number.
        frames_first: whether a segment is denoised from its predecessor's frames.
        approve: whether a segment begins, and the run finishes, only once all segments before are approved.
    """

    run_id: str
    num_segments: int | None
    retries: int = 0
    incarnation: int = 1
    max_ahead: int | None = None
    frames_first: bool = False
    approve: bool = False


@dataclass(frozen=True)
class Storyboard:
    """Every segment of a run, however many there will be. `scenes` are in order and begin with segment 0.

    `changes` are re-rolls and edits in the order in which they were made: of two, the later one holds.
    """

    scenes: tuple[Scene, ...]
    layout: FrameLayout
    changes: tuple[Change, ...] = ()

    def segment(self, index: int) -> SegmentPlan:
        """Segment `index`, from 0: the scene that applies there after all changes."""
        scene = self.changed[bisect_right(self.changed, index, key=_start_of) - 1]
        return SegmentPlan(
            index=index,
            take=take_of(index, self._takes),
            prompt=scene.prompt,
            negative_prompt=scene.negative_prompt,
            guidance_scale=scene.guidance_scale,
            seed=segment_seed(scene.seed, index),
            first_frame=self.layout.first_frame(index),
            num_frames=self.layout.frames_of(index),
            lora_weights=scene.lora_weights,
            pictures=scene.pictures,
        )

    def stream_start(self, index: int) -> int:
        """The segment with which the stream of latents begins that segment `index` belongs to."""
        return self._cuts[bisect_right(self._cuts, index) - 1]

    def edits_of(self, index: int) -> int:
        """How many edits hold in a segment. They are never taken back, so equal numbers stand for equal edits."""
        return sum(isinstance(change, Edit) and change.start <= index for change in self.changes)

    @cached_property
    def changed(self) -> tuple[Scene, ...]:
        """The scenes after all changes."""
        scenes = self.scenes
        for change in self.changes:
            at = bisect_left(scenes, change.start, key=_start_of)
            before, later = scenes[:at], scenes[at:]
            if not later or later[0].start > change.start:  # it begins inside a scene
                later = (replace(before[-1], start=change.start, cuts=False), *later)
            said = said_by(change)
            scenes = (*before, *(replace(scene, **said) for scene in later))
        return scenes

    @cached_property
    def _takes(self) -> tuple[Take, ...]:
        return tuple(change for change in self.changes if isinstance(change, Take))

    def switch_before(self, index: int, *switches: Switch) -> int:
        """The latest segment, up to `index`, where a prompt begins with one of these switches; 0 if none does."""
        if switches not in self._starts:
            self._starts[switches] = sorted(start for start, switch in self._switches if switch in switches)
        starts = self._starts[switches]
        return starts[at - 1] if (at := bisect_right(starts, index)) else 0

    @cached_property
    def _starts(self) -> dict[tuple[Switch, ...], list[int]]:
        return {}

    @cached_property
    def _switches(self) -> list[tuple[int, Switch]]:
        """Where prompts begin, of the storyboard and of changes; a change is a `recache` where no scene begins."""
        switches: dict[int, Switch] = {change.start: "recache" for change in self.changes if change.prompt is not None}
        return list((switches | {scene.start: scene.switch for scene in self.scenes}).items())

    @cached_property
    def _cuts(self) -> list[int]:
        return [0, *(scene.start for scene in self.scenes if scene.cuts and scene.start)]


def said_by(change: Change) -> dict[str, Any]:
    """What a change says of the scenes from its start on."""
    return {name: value for name in EDITABLE if (value := getattr(change, name, None)) is not None}


def _start_of(scene: Scene) -> int:
    return scene.start


def segment_seed(seed: int, segment_index: int) -> int:
    """The seed of one segment, in [0, 2**63); segment 0 keeps the run's own, so that a run begins like the library."""
    return seed if segment_index == 0 else _derived(f"{seed}:{segment_index}")


def chunk_seed(seed: int, chunk: int, step: int) -> int:
    """The seed of the noise that a chunk begins with (step 0), or that its step draws, in [0, 2**63).

    `seed` is that of the segment or of the stream; chunks count from the last cut.
    """
    return _derived(f"{seed}:chunk:{chunk}:{step}")


def take_seed(seed: int, take: int) -> int:
    """The seed of a re-roll that was requested without one, in [0, 2**63)."""
    return _derived(f"{seed}:take:{take}")


def take_of(segment_index: int, takes: Sequence[Take]) -> int:
    """The number of the take that a segment belongs to: the latest that begins at it or before; 0 without any."""
    return next((take.number for take in reversed(takes) if take.start <= segment_index), 0)


def _derived(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _check_index(index: int) -> None:
    if index < 0:
        raise ValueError(f"a segment's index or number is {index}; it must be at least 0.")
