"""The messages between actors and client. None contains a tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import edit_ray
from edit_ray.config import Config
from edit_ray.errors import RunEnded
from edit_ray.runs.events import Hold, RunState, Stage
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Begun, Manifest, SegmentRecord
from edit_ray.runs.run_plan import Change, FrameLayout, RunPlan, SegmentPlan, Storyboard
from edit_ray.tiers.options import ReusingRun
from edit_ray.video.fragments import Part
from edit_ray.video.hls import StreamFiles

GROUP_OF = {
    "prepare_run": "denoise",
    "denoise_segment": "denoise",
    "decode_segment": "decode",
    "encode_segment": "encode",
    "finalize_run": "encode",
}
"""The concurrency groups of the GPU actor: calls of one group wait for each other, all others are answered at once."""


@dataclass(frozen=True)
class RunSpec:
    """One run as every actor sees it: its id, the folder that holds runs, its configuration, and where it stands.

    `submission` tells it from others of the same id. `incarnation` is one higher in each of its lives. The reuse plan
    starts with the segment `planned_from` and replaces `replanned` earlier ones. From the segment `tiled_from` on,
    frames are decoded in tiles.
    """

    run_id: str
    root: Path
    config: Config
    num_segments: int | None = None
    incarnation: int = 1
    changes: tuple[Change, ...] = ()
    planned_from: int = 0
    tiled_from: int | None = None
    submission: str = ""
    replanned: int = 0
    pictures: str | None = None  # the digest of its pictures, if it has some

    @classmethod
    def of(cls, root: Path, config: Config, manifest: Manifest) -> RunSpec:
        """The run as its manifest describes it now."""
        names = ("num_segments", "incarnation", "changes", "planned_from", "tiled_from", "replanned")
        begun, standing = manifest.begun, {name: getattr(manifest, name) for name in names}
        standing["pictures"] = manifest.provenance.get("pictures")
        return cls(begun.run_id, root, config, submission=begun.submission, **standing)

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.root, self.run_id)

    @cached_property
    def layout(self) -> FrameLayout:
        return self.config.layout

    @cached_property
    def storyboard(self) -> Storyboard:
        return replace(self.config.storyboard, changes=self.changes)

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
            approve=self.config.video.approve == "each",
        )

    def texts(self, segment_index: int, most: int) -> list[str]:
        """All prompts and negative prompts; if more than `most`, only those of the segments around this one.

        They come in blocks, two of which are no more than `most`: the last segment of one and the first of the next may
        be in progress at once.
        """
        texts = [text for scene in self.storyboard.changed for text in (scene.prompt, scene.negative_prompt)]
        if len(set(texts)) <= most:
            return texts
        block = max(1, most // 4)
        first = segment_index - segment_index % block
        near = [self.segment(index) for index in range(first, first + block)]
        return [text for segment in near for text in (segment.prompt, segment.negative_prompt)]

    @property
    def key(self) -> str:
        """The run id and a hash of its submission: differs from earlier runs of the same id, in any folder."""
        return run_key(self.run_id, self.submission)

    @property
    def residuals_id(self) -> str:
        """The run's name in the CacheStore, another one for each reuse plan.

        Other hardware makes another plan, so the name also tells which latents are those that the run would make now.
        """
        return f"{self.key}.{self.replanned}"

    def segment(self, index: int) -> SegmentPlan:
        return self.storyboard.segment(index)

    def stream(self, index: int) -> tuple[str, int]:
        """The name of the stream of latents that a segment belongs to, and the segment with which it begins.

        A run is one stream, unless one of its segments begins with a picture where others continue.
        """
        start = self.storyboard.stream_start(index)
        return f"{self.key}/{start}" if start else self.key, start

    def position(self, index: int) -> int:
        """The position in its stream of the first latent that a segment adds."""
        return self.layout.first_latent(index - self.stream(index)[1])

    @property
    def first_tiled(self) -> int | None:
        """The first segment whose frames are decoded in tiles; None if none is."""
        return 0 if self.config.engine.tiled_decode == "always" else self.tiled_from

    def tiled(self, index: int) -> bool:
        """Whether a segment's frames are decoded in tiles."""
        return self.first_tiled is not None and index >= self.first_tiled

    def latents(self, index: int) -> Path:
        """The file of a segment's latents, in its newest take."""
        return self.folder.latents(index, self.segment(index).take)

    def media(self, index: int) -> Path:
        """The file of a segment's frames, in its newest take."""
        return self.folder.media(index, self.segment(index).take)

    def part(self, segment: SegmentPlan) -> Part:
        """The segment's media file, and which of the video's frames it holds."""
        return Part(self.folder.relative(self.media(segment.index)), segment.first_frame, segment.num_frames)

    @property
    def residuals_directory(self) -> Path:
        """The folder of the CacheStore actors' disk tiers."""
        directory = self.config.store.directory
        return Path(directory) if directory else self.root / ".cache_store"

    @property
    def reusing(self) -> ReusingRun:
        """The run as the leases of its residuals know it."""
        config = self.config
        timeout_s = config.engine.step_timeout_s
        return ReusingRun(self.residuals_id, config.store, self.residuals_directory, self.root, timeout_s)

    def stream_files(self) -> StreamFiles:
        """The files by which the video plays while it grows."""
        sampling, keep = self.config.sampling, self.config.output.keep_segments
        return StreamFiles(self.folder.path, fps=sampling.fps, longest=sampling.num_frames, keep=keep)

    @property
    def settings(self) -> str:
        """What determines the frames, as JSON; the same for every run of the same configuration."""
        said = self.config.model_dump(mode="json", include={"model", "sampling", "continuity", "cache"})
        every = [self.segment(index) for index in range(self.num_segments or 0)]
        segments = [
            {"prompt": segment.prompt, "seed": segment.seed}
            | {name: value for name, value in asdict(segment.pictures).items() if value}
            for segment in every
        ]
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
    """A GPU actor's progress: `step` of `num_steps` denoising steps of one segment are done."""

    run_id: str
    segment_index: int
    step: int
    num_steps: int


@dataclass(frozen=True)
class RunStatus:
    """A run as the segment scheduler knows it, or as its folder at `path` describes it.

    `num_segments` and `num_frames` are None if the run continues until it is stopped.
    """

    run_id: str
    state: RunState
    path: str
    committed: int = 0
    num_segments: int | None = None
    num_frames: int | None = None
    height: int = 0
    width: int = 0
    fps: float = 0
    dropped_before: int = 0  # the media of segments before this one are gone
    at_work: tuple[tuple[Stage, int | None], ...] = ()  # the stages in progress, each with its segment
    error: str | None = None
    warning: str | None = None  # what will fail without intervention
    progress: Progress | None = None
    owner: str = ""  # who submitted it; empty if that was not recorded
    job: str = ""  # the submission id of the Ray job that did
    branched_from: str = ""  # the run that it shares its first segments with
    approved: int = 0  # segments that were approved (`video.approve`)
    held_by: Hold | None = None  # what must change before a further segment begins

    @classmethod
    def of(
        cls, path: Path, manifest: Manifest, state: RunState | None = None, progress: Progress | None = None
    ) -> RunStatus:
        """`state` is the segment scheduler's, None if it does not know the run."""
        names: tuple[str, ...] = ("run_id", "height", "width", "owner", "job", "branched_from")
        of_begun = {name: getattr(manifest.begun, name) for name in names}
        names = ("num_segments", "num_frames", "dropped_before", "error", "approved")
        return cls(
            state=state or manifest.state,
            path=str(path),
            committed=len(manifest.segments),
            fps=manifest.begun.layout.fps,
            progress=progress,
            held_by="pause" if manifest.paused and manifest.end is None else None,
            **of_begun,
            **{name: getattr(manifest, name) for name in names},
        )

    @property
    def ended(self) -> bool:
        """Whether the run is done, failed or cancelled."""
        return self.state in ("done", "failed", "cancelled")


def has_ended(status: RunStatus) -> RunEnded:
    """Says why an ended run cannot be steered, and what can be done instead."""
    run_id = status.run_id
    ended = f"has ended ({status.state})" if status.ended else "is being stopped"
    return RunEnded(
        f"run {run_id!r} {ended}: `edit-ray reroll {run_id} --from K` makes segments again, `edit-ray extend {run_id}` "
        f"adds some, and `edit-ray branch {run_id} --at K` starts another run from segment K on"
    )


@dataclass(frozen=True)
class StreamReply:
    """The requested segment, or None: then check the state, and ask again unless the run has ended."""

    record: SegmentRecord | None
    status: RunStatus


def run_key(run_id: str, submission: str) -> str:
    """The name of a run among all that ever had its id (`RunSpec.key`)."""
    return f"{run_id}.{hashlib.blake2b(submission.encode(), digest_size=8).hexdigest()}"


def code_version() -> str:
    """The package's version and a digest of its source, so that an edited checkout counts as another version."""
    package = Path(edit_ray.__file__).parent
    digest = hashlib.blake2b(digest_size=6)
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode())
        digest.update(source.read_bytes())
    return f"{edit_ray.__version__}+{digest.hexdigest()}"


def rounded(**values: Any) -> dict[str, float]:
    """Statistics of a piece of work, rounded to four decimals."""
    return {name: round(float(value), 4) for name, value in values.items()}
