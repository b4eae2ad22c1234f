"""The Python client: submits runs to Ray and streams their segments as they are committed."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from edit_ray.actors import launch
from edit_ray.actors.messages import RunStatus, StreamReply
from edit_ray.config import Config, check_config, load_config, output_root
from edit_ray.errors import ConfigError, EditRayError, RunCancelled, SegmentFailed, UnknownRun
from edit_ray.runs.folder import Manifest, RunFolder, SegmentRecord
from edit_ray.runs.ids import check_run_id, new_run_id
from edit_ray.video.encode import Frames, read_frames

if TYPE_CHECKING:
    import torch

POLL_S = 10.0  # how long one question for the next segment may stay open


@dataclass(frozen=True)
class Segment:
    """One committed segment.

    `frames` are uint8 [F, H, W, 3], decoded from the fragment at `path` (it plays behind the run's `init.mp4`), so that
    every reader at any time sees the same;
    `latents` float32 [1, C, t, h, w], normalised, the lossless source. Each is None unless it was asked for.
    """

    index: int
    prompt: str
    seed: int
    first_frame: int
    num_frames: int
    fps: int
    path: Path
    statistics: Mapping[str, float]
    frames: Frames | None = None
    latents: torch.Tensor | None = None


class LongVideoClient:
    """Talks to the actors in the Ray at `address` (None: the one that Ray itself finds, else a new local one).

    `output` is the folder that holds runs: else $EDIT_RAY_OUTPUT, else ~/edit_ray_outputs.
    """

    def __init__(self, *, output: str | Path | None = None, address: str | None = None) -> None:
        self.output = output_root(str(output) if output is not None else None, os.environ)
        launch.connect(address)

    def submit(self, config: Config | Mapping[str, Any] | str | Path, *, run_id: str | None = None) -> str:
        """Starts a run (and the actors, if need be); returns its id.

        `config` is a `Config`, the same as a mapping, or the path of a YAML file. Raises ConfigError, ModelError,
        RunExists, ResourcesUnavailable, ActorVersionMismatch.
        """
        config = _absolute(_as_config(config))
        run_id = check_run_id(run_id) if run_id is not None else new_run_id(datetime.now(UTC), secrets.token_hex(2))
        if problems := check_config(config):
            raise ConfigError(problems)
        with tempfile.NamedTemporaryFile(dir=self.output, prefix=".probe-") as probe:
            call = (run_id, config.model_dump(mode="json"), str(self.output), probe.name)
            try:
                _ask(launch.segment_scheduler(), "submit", *call)
            except ray.exceptions.RayActorError:  # it was just ending itself: make another, once
                _ask(launch.segment_scheduler(), "submit", *call)
        return run_id

    def status(self, run_id: str) -> RunStatus:
        """Where the run stands: from the segment scheduler, or from the run's folder if that has forgotten it."""
        scheduler = launch.find_segment_scheduler()
        if scheduler is not None:
            try:
                status: RunStatus = _ask(scheduler, "status", run_id)
                return status
            except (UnknownRun, ray.exceptions.RayActorError):
                pass
        return self._status_on_disk(run_id)

    def runs(self) -> list[RunStatus]:
        """The runs that the segment scheduler remembers, in the order of submission; none where none lives."""
        scheduler = launch.find_segment_scheduler()
        return [] if scheduler is None else list(_ask(scheduler, "runs"))

    def cancel(self, run_id: str, timeout_s: float | None = None) -> None:
        """Asks the run to stop; what is committed stays. A run that has ended is left as it is."""
        scheduler = launch.find_segment_scheduler()
        if scheduler is None:
            raise UnknownRun(f"run {run_id!r} is not running: no segment scheduler lives in this Ray")
        _ask(scheduler, "cancel", run_id, timeout_s=timeout_s)

    def stream(self, run_id: str, start: int = 0, *, frames: bool = True, latents: bool = False) -> Iterator[Segment]:
        """Yields each segment from `start` on, in order, as soon as it is committed; ends with the run.

        Raises UnknownRun, SegmentFailed when the run failed, RunCancelled when it was stopped: after the last
        committed segment.
        """
        index = start
        while True:
            reply = self._next(run_id, index)
            if reply.record is not None:
                yield self._segment(reply, frames=frames, latents=latents)
                index += 1
            elif reply.status.state == "done":
                return
            elif reply.status.state == "failed":
                raise SegmentFailed(f"run {run_id!r} failed: {reply.status.error}")
            elif reply.status.state == "cancelled":
                raise RunCancelled(f"run {run_id!r} was stopped")

    def _next(self, run_id: str, index: int) -> StreamReply:
        scheduler = launch.find_segment_scheduler()
        if scheduler is not None:
            try:
                reply: StreamReply = _ask(scheduler, "wait_segment", run_id, index, POLL_S)
                return reply
            except (UnknownRun, ray.exceptions.RayActorError):
                pass
        status, manifest = self._status_on_disk(run_id), self._manifest(run_id)
        record = manifest.segments[index] if index < len(manifest.segments) else None
        if record is None and status.state not in ("done", "failed", "cancelled"):
            raise SegmentFailed(f"run {run_id!r} stands still: it is {status.state}, and nobody works on it")
        return StreamReply(record, status)

    def _segment(self, reply: StreamReply, *, frames: bool, latents: bool) -> Segment:
        record: SegmentRecord | None = reply.record
        assert record is not None
        folder = Path(reply.status.path)
        manifest = RunFolder(folder.parent, folder.name).read_manifest()
        path, init = folder / record.media, folder / "init.mp4"
        return Segment(
            index=record.index,
            prompt=record.prompt,
            seed=record.seed,
            first_frame=record.first_frame,
            num_frames=record.num_frames,
            fps=manifest.fps,
            path=path,
            statistics=record.statistics,
            frames=read_frames(path, height=manifest.height, width=manifest.width, init=init) if frames else None,
            latents=_load_latents(folder / record.latents) if latents else None,
        )

    def _manifest(self, run_id: str) -> Manifest:
        return RunFolder(self.output, run_id).read_manifest()

    def _status_on_disk(self, run_id: str) -> RunStatus:
        manifest = self._manifest(run_id)
        return RunStatus(
            run_id=run_id,
            state=manifest.state,
            path=str(self.output / run_id),
            committed=len(manifest.segments),
            num_segments=manifest.num_segments,
            num_frames=manifest.num_frames,
            error=manifest.error,
        )


def _load_latents(path: Path) -> torch.Tensor:
    from edit_ray.engine.latent_files import load_latents  # here, because most clients need none of torch

    return load_latents(path)


def _as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, str | Path):
        return load_config(Path(config))
    return Config.model_validate(dict(config))


def _absolute(config: Config) -> Config:
    """The same with a model folder's whole path: the actors work in other folders."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder.resolve())})})


def _ask(handle: Any, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
    """One call to an actor; errors of ours arrive as they were raised, without Ray's wrapping."""
    try:
        return ray.get(getattr(handle, method).remote(*arguments), timeout=timeout_s)
    except ray.exceptions.RayTaskError as failed:
        cause = failed.cause
        if isinstance(cause, EditRayError):
            raise cause from None
        raise
