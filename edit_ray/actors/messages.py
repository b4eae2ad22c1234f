"""What the actors say to each other and to the client; tensors are not among it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import edit_ray
from edit_ray.config import Config
from edit_ray.runs.events import RunState
from edit_ray.runs.folder import Manifest, RunFolder, SegmentRecord
from edit_ray.runs.layout import FrameLayout
from edit_ray.runs.plan import RunPlan, SegmentPlan, plan_run
from edit_ray.video.stream_files import Part, StreamFiles

GROUP_OF = {
    "denoise_segment": "denoise",
    "decode_segment": "decode",
    "finalize_run": "decode",
    "prepare_run": "denoise",
}
"""Which calls of the GPU actor wait for each other; what is not named here is answered at once."""


@dataclass(frozen=True)
class RunSpec:
    """One run as every actor sees it: its id, the folder that holds runs, its configuration."""

    run_id: str
    root: Path
    config: Config

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.root, self.run_id)

    @cached_property
    def layout(self) -> FrameLayout:
        return self.config.layout

    @cached_property
    def plan(self) -> RunPlan:
        return plan_run(
            self.run_id,
            prompts=self.config.prompts,
            seed=self.config.sampling.seed,
            layout=self.layout,
            retries=self.config.engine.segment_retries,
        )

    def part(self, segment: SegmentPlan) -> Part:
        """Where the segment's frames lie, and which of the video's they are."""
        media = self.folder.relative(self.folder.media(segment.index))
        return Part(media, segment.first_frame, segment.num_frames)

    def stream_files(self) -> StreamFiles:
        """The run's playing files; they begin with what `rebuild` is told."""
        sampling = self.config.sampling
        return StreamFiles(self.folder.path, fps=sampling.fps, longest=sampling.num_frames)

    @property
    def settings(self) -> str:
        """What the frames follow from, as JSON; the same for every run of the same configuration."""
        said = self.config.model_dump(mode="json", include={"model", "sampling", "continuity", "cache"})
        segments = [{"prompt": segment.prompt, "seed": segment.seed} for segment in self.plan.segments]
        return json.dumps({"edit_ray": edit_ray.__version__, **said, "segments": segments})

    def new_manifest(self) -> Manifest:
        sampling = self.config.sampling
        return Manifest(
            run_id=self.run_id,
            version=edit_ray.__version__,
            state="queued",
            height=sampling.height,
            width=sampling.width,
            fps=sampling.fps,
            num_segments=len(self.plan.segments),
            num_frames=self.plan.num_frames,
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
    """A run as the segment scheduler knows it; `path` is its folder."""

    run_id: str
    state: RunState
    path: str
    committed: int
    num_segments: int
    num_frames: int
    error: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class StreamReply:
    """The segment that was waited for, or None: then look at the state, and ask again unless the run has ended."""

    record: SegmentRecord | None
    status: RunStatus

    @property
    def ended(self) -> bool:
        return self.status.state in ("done", "failed", "cancelled")


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
