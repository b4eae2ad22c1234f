"""A run as OpenAI's video object, and the runs as pages of them. Nothing here touches a file or a socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edit_ray.actors.messages import RunStatus
from edit_ray.config import Config
from edit_ray.runs.events import RunState
from edit_ray.runs.manifest import Manifest, SegmentRecord
from edit_ray.server.refusals import refuse
from edit_ray.server.video_request import Offer, rounding

VideoState = Literal["queued", "in_progress", "completed", "failed"]
STATE_OF: Mapping[RunState, VideoState] = {
    "queued": "queued",
    "waiting": "queued",
    "open": "queued",
    "preparing": "in_progress",
    "running": "in_progress",
    "paused": "in_progress",
    "finalizing": "in_progress",
    "stopping": "in_progress",
    "done": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
RECENT = 8  # segments whose pace the estimate of the remaining time is made from


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class VideoFailure(_Answer):
    """Why a video has failed: `cancelled` or `generation_failed`, and a sentence."""

    code: Literal["cancelled", "generation_failed"]
    message: str


class SceneStart(_Answer):
    """A prompt, from the segment on with which it begins."""

    segment: int
    prompt: str
    negative_prompt: str
    guidance_scale: float
    seed: int


class StepReached(_Answer):
    """`step` of `num_steps` denoising steps of a segment are done."""

    segment: int
    step: int
    num_steps: int


class RunOfVideo(_Answer):
    """What OpenAI's object has no name for. Null: unknown, or there is none.

    `state` is the run's own. `note` says what was rounded, `warning` what will fail without intervention. `eta_s` is
    estimated from the pace of the latest segments, `queue_position` counts the runs that wait before it from 0.
    """

    state: RunState
    committed: int
    num_segments: int | None
    num_frames: int | None
    fps: float
    height: int
    width: int
    seed: int | None
    dropped_before: int
    step: StepReached | None = None
    eta_s: float | None = None
    queue_position: int | None = None
    note: str | None = None
    warning: str | None = None
    paused: bool = False
    awaiting_approval: bool = False
    approve: Literal["none", "each"] = "none"
    approved: int = 0
    applied_from: int | None = Field(default=None, description="Of a PATCH: the segment from which its edit holds.")
    storyboard: list[SceneStart] | None = Field(default=None, description="Of one video; a list of videos has none.")


class Video(_Answer):
    """OpenAI's video object."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoState
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    size: str
    seconds: str
    prompt: str | None = None
    remixed_from_video_id: str | None = None
    error: VideoFailure | None = None
    edit_ray: RunOfVideo


class VideoPage(_Answer):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(_Answer):
    """The answer to DELETE."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class SegmentObject(_Answer):
    """A committed segment; the links are relative to the server."""

    index: int
    take: int
    prompt: str
    seed: int
    first_frame: int
    num_frames: int
    statistics: dict[str, float]
    media: str | None
    latents: str | None
    thumbnail: str | None


class SegmentPage(_Answer):
    """A page of segments, in order."""

    object: Literal["list"] = "list"
    data: list[SegmentObject]
    has_more: bool


@dataclass(frozen=True)
class RunView:
    """All that is known of a run: its folder's manifest and configuration (None: unreadable), and its status.

    `created_at` and `changed_at` are Unix seconds. `position` is that in the queue.
    """

    manifest: Manifest
    status: RunStatus
    config: Config | None
    created_at: float
    changed_at: float
    position: int | None = None

    @property
    def run_id(self) -> str:
        return self.manifest.begun.run_id


def video_of(view: RunView, offers: Mapping[str, Offer], *, whole: bool = True) -> Video:
    """The video object of a run; with `whole` also its storyboard."""
    manifest, status, config = view.manifest, view.status, view.config
    begun, state = manifest.begun, STATE_OF[status.state]
    frames = status.num_frames if status.num_frames is not None else _frames(manifest.segments)
    return Video(
        id=view.run_id,
        model=model_name(config, offers),
        status=state,
        progress=progress_of(status),
        created_at=int(view.created_at),
        completed_at=int(view.changed_at) if state == "completed" else None,
        size=f"{begun.width}x{begun.height}",
        seconds=f"{frames / begun.layout.fps:.10g}",
        prompt=_prompt(manifest, config),
        remixed_from_video_id=status.branched_from or None,
        error=_failure(status),
        edit_ray=RunOfVideo(
            state=status.state,
            committed=status.committed,
            num_segments=status.num_segments,
            num_frames=status.num_frames,
            fps=begun.layout.fps,
            height=begun.height,
            width=begun.width,
            seed=config.sampling.seed if config is not None else None,
            dropped_before=status.dropped_before,
            step=_step(status),
            eta_s=None if status.ended else eta_s(manifest.segments, status.num_segments),
            queue_position=view.position,
            note=rounding(config) if config is not None and _is_as_asked(manifest, config) else None,
            warning=_warning(status),
            paused=status.held_by == "pause",
            awaiting_approval=status.held_by == "approval",
            approve=config.video.approve if config is not None else "none",
            approved=status.approved,
            storyboard=_scenes(manifest, config) if whole and config is not None else None,
        ),
    )


def progress_of(status: RunStatus) -> int:
    """The percentage of the denoising steps that are done; 100 only of a video that is whole."""
    if status.state == "done":
        return 100
    if not status.num_segments:
        return 0
    at = status.progress
    begun = at.segment_index + at.step / max(1, at.num_steps) if at is not None else 0.0
    return max(0, min(99, int(100 * max(begun, status.committed) / status.num_segments)))


def eta_s(segments: Sequence[SegmentRecord], num_segments: int | None) -> float | None:
    """Seconds until the last segment is committed, at the pace of the latest ones; None if there is no pace or end."""
    if num_segments is None or len(segments) < 2:
        return None
    recent = [segment.statistics.get("publish_at") for segment in segments[-RECENT:]]
    first, last = recent[0], recent[-1]
    if first is None or last is None or last < first:
        return None
    return round((num_segments - len(segments)) * (last - first) / (len(recent) - 1), 1)


def model_name(config: Config | None, offers: Mapping[str, Offer]) -> str:
    """The name of a run's model here: that of the offer which it was made from, else the last part of its path."""
    if config is None:
        return "unknown"
    same = (name for name, offer in offers.items() if _unchangeable(offer.base) == _unchangeable(config))
    return next(same, config.model.path.rstrip("/").rsplit("/", 1)[-1].removeprefix("builtin:"))


def _unchangeable(config: Config) -> tuple[Any, ...]:
    """What no request changes."""
    return config.model, config.engine, config.store, config.output, config.metrics


def behind(ids: Sequence[str], after: str | None) -> Sequence[str]:
    """The ids behind `after`, all without one. Raises Refusal where it is none of them."""
    if after is not None and after not in ids:
        raise refuse("invalid_value", "after is the id of no video here; it must be the last id of a page.", "after")
    return ids if after is None else ids[ids.index(after) + 1 :]


def segment_of(manifest: Manifest, record: SegmentRecord) -> SegmentObject:
    """A committed segment with links to its files; null where they were dropped."""
    base = f"/v1/videos/{manifest.begun.run_id}/segments"
    there = record.index >= manifest.dropped_before
    return SegmentObject(
        **{name: getattr(record, name) for name in ("index", "take", "prompt", "seed", "first_frame", "num_frames")},
        statistics=dict(record.statistics),
        media=f"{base}/{record.media.rpartition('/')[2]}" if there else None,
        latents=f"{base}/{record.index}/latents" if there else None,
        thumbnail=f"{base}/{record.index}/thumbnail" if there else None,
    )


def _frames(segments: Sequence[SegmentRecord]) -> int:
    return segments[-1].first_frame + segments[-1].num_frames if segments else 0


def _failure(status: RunStatus) -> VideoFailure | None:
    if status.state == "cancelled":
        return VideoFailure(code="cancelled", message="The run was cancelled; what was committed plays.")
    if status.state == "failed":
        return VideoFailure(code="generation_failed", message=status.error or "The run has failed.")
    return None


def _step(status: RunStatus) -> StepReached | None:
    at = status.progress
    return StepReached(segment=at.segment_index, step=at.step, num_steps=at.num_steps) if at is not None else None


def _warning(status: RunStatus) -> str | None:
    if status.state == "open":
        return "Nobody works on the run; `edit-ray resume` continues it."
    return status.warning


def _is_as_asked(manifest: Manifest, config: Config) -> bool:
    return not manifest.begun.branched_from and manifest.num_segments == config.num_segments


def _prompt(manifest: Manifest, config: Config | None) -> str | None:
    """The prompt that was asked for last."""
    changed = (change.prompt for change in reversed(manifest.changes) if change.prompt is not None)
    return next(changed, config.prompt_segments[0].prompt if config is not None else None)


def _scenes(manifest: Manifest, config: Config) -> list[SceneStart]:
    return [
        SceneStart(
            segment=scene.start,
            prompt=scene.prompt,
            negative_prompt=scene.negative_prompt,
            guidance_scale=scene.guidance_scale,
            seed=scene.seed,
        )
        for scene in replace(config.storyboard, changes=manifest.changes).changed
    ]


def as_json(answer: BaseModel) -> dict[str, Any]:
    """An answer as JSON values."""
    return answer.model_dump(mode="json")
