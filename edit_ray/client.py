"""The Python client: submits runs to Ray and streams their segments as they are committed."""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from edit_ray import files
from edit_ray.actors import connection, launch
from edit_ray.actors.messages import RunStatus, StreamReply, has_ended
from edit_ray.actors.segment_stream import Segment as Segment
from edit_ray.actors.segment_stream import SegmentStream
from edit_ray.config import Config, check_config, config_of, load_config, output_root
from edit_ray.engine.options import EngineOptions
from edit_ray.errors import (
    ConfigError,
    EditRayError,
    NotYourRun,
    ResourcesUnavailable,
    RunLive,
    SegmentFailed,
    UnknownRun,
)
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import check_run_id, check_segment_index, new_run_id, owner_here
from edit_ray.runs.manifest_file import ManifestReader
from edit_ray.runs.run_plan import Edit

if TYPE_CHECKING:
    pass

POLL_S = 10.0  # for one call that waits for the next segment
RETRY_S = 0.2  # between two calls to a segment scheduler that is being restarted


class LongVideoClient:
    """A client of the actors in the Ray at `address` (None: the one that Ray itself finds).

    `output` is the folder that holds runs: else $EDIT_RAY_OUTPUT, else ~/edit_ray_outputs. The client waits for a
    segment scheduler that is being restarted, and restarts one that answers nothing for `answer_timeout_s`. Without a
    running Ray, runs are read from their folders, and the first run that begins or is resumed starts a local Ray.
    `connect=False` only reads folders.

    A run is identified by `output` and its id, and belongs to its owner, `$EDIT_RAY_OWNER` or the login name. Changing
    a run of another owner raises NotYourRun unless `force` is given.
    """

    def __init__(
        self,
        *,
        output: str | Path | None = None,
        address: str | None = None,
        connect: bool = True,
        answer_timeout_s: float = EngineOptions().answer_timeout_s,
    ) -> None:
        self.output = output_root(str(output) if output is not None else None, os.environ)
        self.owner = owner_here(os.environ)
        self._address, self._connect, self._started_ray = address, connect, False
        self._answer_timeout_s = answer_timeout_s
        self._latest: tuple[str, ManifestReader] | None = None  # the run that is streamed from its folder
        if connect:
            connection.connect_if_running(address)

    def close(self) -> None:
        """End the actors if this client started their Ray, which ends with this process: Prometheus must forget them.

        A process that exits does so by itself; a caller of `os._exit` must do it.
        """
        if self._started_ray:
            self._started_ray = False
            launch.end_actors()

    def submit(
        self, config: Config | Mapping[str, Any] | str | Path, *, run_id: str | None = None, checked: bool = False
    ) -> str:
        """Start a run, and the actors if there are none; returns the run's id.

        `config` is a `Config`, the same as a mapping, or the path of a YAML file. It is checked against its model here,
        unless it is already `checked`, as what `load_config` returns is.

        Raises ConfigError, ModelError, RunExists, ResourcesUnavailable, ActorVersionMismatch.
        """
        if isinstance(config, str | Path):
            config = load_config(Path(config))
        elif not isinstance(config, Config):
            config = config_of(config)
        elif not checked and (problems := check_config(config)):
            raise ConfigError(problems)
        run_id = check_run_id(run_id) if run_id is not None else _new_id()
        token = secrets.token_hex(8)  # by which a repeated call recognises its own run
        probe = RunFolder(self.output, run_id).probe(token)
        probe.touch(0o600)
        try:
            settings, root, owner = config.model_dump(mode="json"), str(self.output), self.owner
            self._ask("submit", run_id, settings, root, str(probe), token, owner.name, owner.job, starts=True)
        finally:
            files.remove(probe)
        return run_id

    def resume(
        self,
        run_id: str,
        *,
        allow_different_hardware: bool = False,
        remake_damaged: bool = False,
        force: bool = False,
    ) -> RunStatus:
        """Resume a run at its first uncommitted segment; a live or done run is left unchanged.

        With `remake_damaged`, committed files that are not as they were written are made again first, also of a done
        run. Raises UnknownRun, NotYourRun, RunExists, RunLocked, ManifestUnreadable, ConfigError,
        HardwareDiffers, RunDamaged, ResourcesUnavailable, ActorVersionMismatch.
        """
        return self._go_on("resume", run_id, force, allow_different_hardware, remake_damaged)

    def extend(
        self, run_id: str, segments: int, *, allow_different_hardware: bool = False, force: bool = False
    ) -> RunStatus:
        """Add `segments` more segments to an ended run; return its status. Raises as `resume` does, and RunLive."""
        return self._go_on("extend", run_id, force, segments, allow_different_hardware)

    def reroll(
        self,
        run_id: str,
        start: int,
        *,
        seed: int | None = None,
        prompt: str | None = None,
        allow_different_hardware: bool = False,
        force: bool = False,
    ) -> RunStatus:
        """Make an ended run's segments from `start` on again, with another seed (derived if None).

        So can be an active run with nothing in progress that is paused or waits for approval. The old segments stay in
        the run's folder. Raises as `extend`.
        """
        return self._go_on("reroll", run_id, force, start, seed, prompt, allow_different_hardware)

    def steer(
        self,
        run_id: str,
        from_segment: int | None = None,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        request: str | None = None,
        force: bool = False,
    ) -> Edit:
        """Edit the storyboard of an active run: what is given holds from a segment on, to the end of the run.

        That is the first one whose denoising has not begun, or `from_segment` if that comes later; the returned edit
        has it as `start`. The edit is durable then. Of calls with the same `request` one makes an edit.

        Raises UnknownRun if the run is not active, RunEnded, ConfigError, ModelError, NotYourRun, ResourcesUnavailable.
        """
        said = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "guidance_scale": guidance_scale,
            "seed": seed,
        }
        token = secrets.token_hex(8) if request is None else str(request)
        edit: Edit = self._ask_active("steer", run_id, force, from_segment, said, token)
        return edit

    def pause(self, run_id: str, *, force: bool = False) -> RunStatus:
        """Let no further segment of an active run begin; what has begun is made. It stays so when the run is resumed.

        Raises as `steer`.
        """
        status: RunStatus = self._ask_active("pause", run_id, force, True)
        return status

    def unpause(self, run_id: str, *, force: bool = False) -> RunStatus:
        """Let further segments of an active run begin again. Raises as `steer`."""
        status: RunStatus = self._ask_active("pause", run_id, force, False)
        return status

    def approve(self, run_id: str, segment: int | None = None, *, force: bool = False) -> RunStatus:
        """Approve the segments of an active run up to this one, by default the latest (`video.approve: each`).

        Raises as `steer`.
        """
        status: RunStatus = self._ask_active("approve", run_id, force, segment)
        return status

    def branch(
        self,
        run_id: str,
        at: int,
        *,
        new_id: str | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        num_segments: int | None = None,
        allow_different_hardware: bool = False,
        request: str | None = None,
    ) -> RunStatus:
        """Start a new run that shares the committed segments before `at` of a run, whatever state that is in.

        From `at` on it follows the storyboard as that run does now, with `prompt` and `seed` in place of the
        storyboard's. It has `num_segments`, None: as many. The files are shared by links where possible; the source
        never changes. Of calls with the same `new_id` and `request` one makes a run, and all return its status.

        Raises UnknownRun, RunExists, ManifestUnreadable, ConfigError, ModelError, HardwareDiffers, RunDamaged,
        ResourcesUnavailable, ActorVersionMismatch.
        """
        new_id = check_run_id(new_id) if new_id is not None else _new_id()
        self._status_on_disk(check_run_id(run_id))
        said = {"prompt": prompt, "seed": seed}
        of, token = (str(self.output), run_id, at), secrets.token_hex(8) if request is None else str(request)
        asked = (new_id, *of, said, num_segments, allow_different_hardware, token, self.owner.name, self.owner.job)
        status: RunStatus = self._ask("branch", *asked, starts=True)
        return status

    def status(self, run_id: str) -> RunStatus:
        """The run's status: from the segment scheduler, or from the run's folder if that does not know the run."""
        status: RunStatus | None = self._ask_if_known("status", run_id)
        return status if status is not None and self._is_meant(status) else self._status_on_disk(run_id)

    def runs(self) -> list[RunStatus]:
        """The runs that the segment scheduler knows, in the order of submission; none if there is no scheduler."""
        return list(self._ask_if_known("runs") or [])

    def cancel(self, run_id: str, timeout_s: float | None = None, *, force: bool = False) -> None:
        """Stop a run; what is committed stays. An ended run stays as it is.

        Raises UnknownRun if the run is not active, NotYourRun. With a `timeout_s` in seconds its owner and folder are
        not checked, for which there may be no time.
        """
        if timeout_s is None:
            status = self.status(run_id)
            self.check_mine(status, force)
            if status.ended:
                return
            if status.state == "open":
                raise UnknownRun(f"nobody works on run {run_id!r}; what is committed lies in {status.path}")
        self._ask("cancel", run_id, timeout_s=timeout_s)

    def check_mine(self, status: RunStatus, force: bool = False) -> None:
        """Raise NotYourRun if the run belongs to another owner and `force` is not given."""
        if not force and not self.owner.owns(status.owner):
            raise NotYourRun(
                f"run {status.run_id!r} belongs to {status.owner!r}, and you are {self.owner.name!r} "
                "(EDIT_RAY_OWNER, else the login name); --force acts on it anyway"
            )

    def stream(self, run_id: str, start: int = 0, *, frames: bool = True, latents: bool = False) -> SegmentStream:
        """Iterate over the segments from `start` on as they are committed, with `for` or `async for`, to the run's end.

        A slow reader slows no other. Iterating raises UnknownRun, SegmentGone, and after the last committed segment
        SegmentFailed if the run failed, RunCancelled if it was stopped.
        """
        return SegmentStream(self, run_id, start, frames, latents)

    def wait_segment(self, run_id: str, index: int) -> StreamReply:
        """The segment when it is committed, or after some time None: then check whether the run has ended.

        Raises ConfigError for an index below 0, UnknownRun, SegmentFailed if the run is not active.
        """
        check_segment_index(index)
        reply: StreamReply | None = self._ask_if_known("wait_segment", run_id, index, POLL_S)
        if reply is not None and self._is_meant(reply.status):
            return reply
        folder = RunFolder(self.output, check_run_id(run_id))
        if self._latest is None or self._latest[0] != run_id:
            self._latest = run_id, ManifestReader(folder.manifest)
        manifest = folder.read_manifest(self._latest[1])
        status = RunStatus.of(folder.path, manifest)
        record = manifest.segments[index] if index < len(manifest.segments) else None
        if record is None and not status.ended:
            raise SegmentFailed(f"nobody works on run {run_id!r}; run `edit-ray resume {run_id}`")
        return StreamReply(record, status)

    def _is_meant(self, status: RunStatus) -> bool:
        """Whether it is the run of its id in `output`; if there is none, another that is active or still exists."""
        own = self.output / status.run_id
        if own.exists():
            return os.path.realpath(own) == os.path.realpath(status.path)
        return not status.ended or Path(status.path).exists()

    def _go_on(self, method: str, run_id: str, force: bool, *arguments: Any) -> RunStatus:
        self.check_mine(self._status_on_disk(check_run_id(run_id)), force)
        status: RunStatus = self._ask(method, run_id, str(self.output), *arguments, starts=True)
        return status

    def _ask_active(self, method: str, run_id: str, force: bool, *arguments: Any) -> Any:
        """The segment scheduler's answer about a run that must be active. Raises UnknownRun, RunEnded, NotYourRun."""
        status = self.status(check_run_id(run_id))
        self.check_mine(status, force)
        if status.ended:
            raise has_ended(status)
        if status.state == "open":
            raise UnknownRun(f"nobody works on run {run_id!r}; run `edit-ray resume {run_id}` first")
        return self._ask(method, run_id, *arguments)

    def _status_on_disk(self, run_id: str) -> RunStatus:
        folder = RunFolder(self.output, run_id)
        return RunStatus.of(folder.path, folder.read_manifest())

    def _ask_if_known(self, method: str, *arguments: Any) -> Any:
        """The answer; None if there is no segment scheduler, or it does not know the run."""
        try:
            return self._ask(method, *arguments)
        except UnknownRun:
            return None

    def _ask(self, method: str, *arguments: Any, timeout_s: float | None = None, starts: bool = False) -> Any:
        """The segment scheduler's answer. A scheduler that is being restarted is called again.

        `starts`: a Ray and a scheduler are started if there is none. Raises errors of ours without Ray's wrapping, and
        UnknownRun if no scheduler is alive and none is to be started.
        """
        if starts and connection.connect(self._address):
            self._started_ray = True
            atexit.register(self.close)  # before Ray's own handler, which was registered when Ray was imported
        deadline: float | None = None if timeout_s is None else time.monotonic() + timeout_s
        called = False
        while starts or (self._connect and ray.is_initialized()):
            try:
                scheduler = (
                    launch.segment_scheduler(self._answer_timeout_s) if starts else launch.find_segment_scheduler()
                )
                if scheduler is None:
                    break
                call = getattr(scheduler, method).remote(*arguments)
                if timeout_s is not None:
                    return ray.get(call, timeout=timeout_s)
                return launch.answer_of(scheduler, call, self._answer_timeout_s)
            except ray.exceptions.RayTaskError as failed:
                if called and isinstance(failed.cause, RunLive):
                    return self.status(arguments[0])  # it was begun, only the answer was lost
                if isinstance(failed.cause, EditRayError):
                    raise failed.cause from None
                raise
            except ray.exceptions.RayActorError:
                called, deadline = True, deadline or time.monotonic() + launch.RESTART_TIMEOUT_S
                if time.monotonic() > deadline:
                    raise ResourcesUnavailable(
                        f"the segment scheduler was not back within {launch.RESTART_TIMEOUT_S:g} s; what is committed "
                        "is safe: look at the Ray cluster, then run `edit-ray resume RUN`"
                    ) from None
                time.sleep(RETRY_S)
        which = f"run {arguments[0]!r}" if arguments else "no run"
        raise UnknownRun(f"{which} is not running: no segment scheduler lives in this Ray")


def _new_id() -> str:
    return new_run_id(datetime.now(UTC), secrets.token_hex(2))
