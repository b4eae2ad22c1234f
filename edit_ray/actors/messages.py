"""What the actors say to each other and to the client; tensors are not among it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import edit_ray
from edit_ray.config import Config
from edit_ray.runs.events import RunState, Stage
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.manifest import Begun, Manifest, SegmentRecord
from edit_ray.runs.plan import RunPlan, SegmentPlan, Storyboard, Take
from edit_ray.runs.retention import first_needed
from edit_ray.tiers.options import ReusingRun
from edit_ray.video.stream_files import Part, StreamFiles

GROUP_OF = {
    "prepare_run": "denoise",
    "denoise_segment": "denoise",
    "decode_segment": "decode",
    "encode_segment": "encode",
    "finalize_run": "encode",
}
"""Which calls of the GPU actor wait for each other; what is not named here is answered at once."""


@dataclass(frozen=True)
class RunSpec:
    """One run as every actor sees it: its id, the folder that holds runs, its configuration, and where it stands.

    `submission` tells it from others of the same name. `incarnation` is one higher in each of its lives. What segments
    reuse of each other was planned with the segment `planned_from`, `replanned` times before. From the segment
    `tiled_from` on the manifest has frames in tiles.
    """

    run_id: str
    root: Path
    config: Config
    num_segments: int | None = None
    incarnation: int = 1
    takes: tuple[Take, ...] = ()
    planned_from: int = 0
    tiled_from: int | None = None
    submission: str = ""
    replanned: int = 0

    @classmethod
    def of(cls, root: Path, config: Config, manifest: Manifest) -> RunSpec:
        """The run as its manifest has it at this moment."""
        return cls(
            run_id=manifest.begun.run_id,
            root=root,
            config=config,
            num_segments=manifest.num_segments,
            incarnation=manifest.incarnation,
            takes=manifest.takes,
            planned_from=manifest.planned_from,
            tiled_from=manifest.tiled_from,
            submission=manifest.begun.submission,
            replanned=manifest.replanned,
        )

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.root, self.run_id)

    @cached_property
    def layout(self) -> FrameLayout:
        return self.config.layout

    @cached_property
    def storyboard(self) -> Storyboard:
        return replace(self.config.storyboard, takes=self.takes)

    @property
    def plan(self) -> RunPlan:
        """The run as the state machine sees it."""
        engine = self.config.engine
        return RunPlan(
            self.run_id,
            self.num_segments,
            retries=engine.segment_retries,
            incarnation=self.incarnation,
            max_ahead=engine.max_ahead,
            frames_first=self.layout.denoise_needs_frames,
        )

    def texts(self, index: int, most: int) -> list[str]:
        """Every text that a segment is denoised with; of more than `most` those of the segments around this one.

        They come in blocks, two of which are no more than `most`: the last segment of one and the first of the next may
        be at work at once.
        """
        texts = [text for scene in self.storyboard.scenes for text in (scene.prompt, scene.negative_prompt)]
        texts += [take.prompt for take in self.takes if take.prompt is not None]
        if len(set(texts)) <= most:
            return texts
        block = max(1, most // 4)
        near = [self.segment(number) for number in range(index - index % block, index - index % block + block)]
        return [text for segment in near for text in (segment.prompt, segment.negative_prompt)]

    @property
    def key(self) -> str:
        """The run's name among all runs that ever had its id, in whichever folder."""
        return run_key(self.run_id, self.submission)

    @property
    def residuals_id(self) -> str:
        """What the CacheStore knows the run by: another name for each plan of what segments reuse.

        As other hardware makes another plan, it also tells which latents are those that this run would make now.
        """
        return f"{self.key}.{self.replanned}"

    def segment(self, index: int) -> SegmentPlan:
        return self.storyboard.segment(index)

    @property
    def first_tiled(self) -> int | None:
        """The segment from which on frames are decoded in tiles; None: none is."""
        return 0 if self.config.engine.tiled_decode == "always" else self.tiled_from

    def tiled(self, index: int) -> bool:
        """Whether a segment's frames are decoded in tiles."""
        return self.first_tiled is not None and index >= self.first_tiled

    def may_be_tiled(self, index: int) -> bool:
        """Whether a segment that is decoded as a whole may be decoded in tiles instead."""
        return not self.tiled(index) and self.config.engine.tiled_decode != "never"

    def latents(self, index: int) -> Path:
        """The file of a segment's latents, in its newest take."""
        return self.folder.latents(index, self.segment(index).take)

    def context(self, index: int, needed_latents: int) -> list[Path]:
        """The files of the last `needed_latents` latents before a segment."""
        return [self.latents(before) for before in range(first_needed(index, needed_latents, self.layout), index)]

    def media(self, index: int) -> Path:
        """The file of a segment's frames, in its newest take."""
        return self.folder.media(index, self.segment(index).take)

    def part(self, segment: SegmentPlan) -> Part:
        """Where the segment's frames lie, and which of the video's they are."""
        return Part(self.folder.relative(self.media(segment.index)), segment.first_frame, segment.num_frames)

    @property
    def residuals_directory(self) -> Path:
        """Of the CacheStore actors' disk tiers."""
        directory = self.config.store.directory
        return Path(directory) if directory else self.root / ".cache_store"

    @property
    def reusing(self) -> ReusingRun:
        """What the leases of its residuals need to know."""
        config = self.config
        timeout_s = config.engine.step_timeout_s
        return ReusingRun(self.residuals_id, config.store, self.residuals_directory, self.root, timeout_s)

    def stream_files(self) -> StreamFiles:
        """The run's playing files; they begin with what `rebuild` is told."""
        sampling, keep = self.config.sampling, self.config.output.keep_segments
        return StreamFiles(self.folder.path, fps=sampling.fps, longest=sampling.num_frames, keep=keep)

    @property
    def settings(self) -> str:
        """What the frames follow from, as JSON; the same for every run of the same configuration."""
        said = self.config.model_dump(mode="json", include={"model", "sampling", "continuity", "cache"})
        every = [self.segment(index) for index in range(self.num_segments or 0)]
        segments = [{"prompt": segment.prompt, "seed": segment.seed} for segment in every]
        return json.dumps({"edit_ray": edit_ray.__version__, **said, "segments": segments})

    def begun(self, submission: str, provenance: Mapping[str, str | int], owner: str = "", job: str = "") -> Begun:
        """The first line of the run's manifest."""
        return Begun(
            run_id=self.run_id,
            version=edit_ray.__version__,
            height=self.config.sampling.height,
            width=self.config.sampling.width,
            layout=self.layout,
            num_segments=self.num_segments,
            submission=submission,
            provenance=provenance,
            owner=owner,
            job=job,
        )


@dataclass(frozen=True)
class Progress:
    """Where the GPU actor stands: `step` of `num_steps` denoising steps of one segment are done."""

    run_id: str
    segment_index: int
    step: int
    num_steps: int


@dataclass(frozen=True)
class RunStatus:
    """A run as the segment scheduler knows it, or as its folder at `path` has it.

    `num_segments` and `num_frames` are None where it goes on until it is stopped.
    """

    run_id: str
    state: RunState
    path: str
    committed: int
    num_segments: int | None
    num_frames: int | None
    height: int
    width: int
    fps: float
    dropped_before: int = 0  # the media of segments before this one are gone
    at_work: tuple[tuple[Stage, int | None], ...] = ()  # the stages that it is in, each with its segment
    error: str | None = None
    warning: str | None = None  # what will go wrong if nobody does anything
    progress: Progress | None = None
    owner: str = ""  # who submitted it; empty where that was not recorded
    job: str = ""  # the submission id of the Ray job that did

    @classmethod
    def of(
        cls, path: Path, manifest: Manifest, state: RunState | None = None, progress: Progress | None = None
    ) -> RunStatus:
        """`state` is the segment scheduler's word, None where it has none."""
        begun = manifest.begun
        return cls(
            run_id=begun.run_id,
            state=state or manifest.state,
            path=str(path),
            committed=len(manifest.segments),
            num_segments=manifest.num_segments,
            num_frames=manifest.num_frames,
            height=begun.height,
            width=begun.width,
            fps=begun.layout.fps,
            dropped_before=manifest.dropped_before,
            error=manifest.error,
            progress=progress,
            owner=begun.owner,
            job=begun.job,
        )

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or cancelled. One that is not may still wait, `paused` or `open`."""
        return self.state in ("done", "failed", "cancelled")


@dataclass(frozen=True)
class StreamReply:
    """The segment that was waited for, or None: then look at the state, and ask again unless the run has ended."""

    record: SegmentRecord | None
    status: RunStatus


def run_key(run_id: str, submission: str) -> str:
    """See `RunSpec.key`."""
    return f"{run_id}.{hashlib.blake2b(submission.encode(), digest_size=8).hexdigest()}"


def code_version() -> str:
    """The package's version and a digest of its source: actors of an edited checkout are another version."""
    package = Path(edit_ray.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode())
        digest.update(source.read_bytes())
    return f"{edit_ray.__version__}+{digest.hexdigest()}"


def statistics(**values: Any) -> dict[str, float]:
    """Figures of a piece of work, rounded to what can be meant."""
    return {name: round(float(value), 4) for name, value in values.items()}
