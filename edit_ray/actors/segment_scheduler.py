"""The segment scheduler actor: carries out what the state machine says, keeps the manifests, answers clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from edit_ray.actors.messages import Progress, RunSpec, RunStatus, StreamReply, code_version, statistics
from edit_ray.config import Config, check_config, dump_yaml
from edit_ray.errors import (
    ConfigError,
    EditRayError,
    EntryLost,
    RunCancelled,
    RunExists,
    SegmentFailed,
    StaleLease,
    UnknownRun,
)
from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    Event,
    RunState,
    RunSubmitted,
    StopWork,
    Work,
    WorkDone,
    WorkFailed,
)
from edit_ray.runs.folder import Manifest, SegmentRecord
from edit_ray.runs.plan import SegmentPlan
from edit_ray.runs.scheduler import SegmentScheduler
from edit_ray.video.stream_files import StreamFiles

ENDED_RUNS_KEPT = 100
_REPEATABLE = (
    SegmentFailed,
    RunCancelled,
    EntryLost,
    StaleLease,
)  # errors of ours that another attempt may not meet again


class Crew(Protocol):
    """The other actors, wherever they run. A call to an actor that is not there raises ConnectionError."""

    async def start(self, spec: RunSpec) -> None:
        """They exist, answer, fit this run and see its folder. Raises ResourcesUnavailable, ActorVersionMismatch."""

    async def denoiser(self, method: str, *arguments: Any) -> Any: ...
    async def store(self, method: str, *arguments: Any) -> Any: ...

    async def end(self) -> None:
        """Ends every actor, this one too."""


@dataclass
class _LiveRun:
    spec: RunSpec
    manifest: Manifest
    stream: StreamFiles
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    statistics: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.manifest.state in ("done", "failed", "cancelled")


class SegmentSchedulerActor:
    """One event loop: `SegmentScheduler` decides, tasks carry out, their outcome is the next event."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._machine = SegmentScheduler()
        self._runs: dict[str, _LiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._submitting = asyncio.Lock()
        self._last_use = 0

    async def describe(self) -> dict[str, str | int]:
        return {"version": code_version(), "pid": os.getpid()}

    async def submit(self, run_id: str, config: dict[str, Any], root: str, probe: str) -> RunStatus:
        """Queues a run whose folder is `root/run_id`; `probe` is a file there that every node has to see.

        Raises ConfigError, RunExists, ResourcesUnavailable, ActorVersionMismatch; then nothing was written.
        """
        spec = RunSpec(run_id, Path(root), Config.model_validate(config))
        if problems := await asyncio.to_thread(check_config, spec.config):
            raise ConfigError(problems)
        self._last_use += 1
        async with self._submitting:
            try:
                await self._accept(spec, Path(probe))
            finally:
                if self._machine.idle:
                    self._spawn(self._exit_when_idle(spec.config.engine.idle_exit_s))
        return await self.status(run_id)

    async def _accept(self, spec: RunSpec, probe: Path) -> None:
        known = self._runs.get(spec.run_id)
        path = known.spec.folder.path if known else spec.folder.path
        if known or path.exists():
            raise RunExists(f"run id {spec.run_id!r} is taken by {path}; choose another run id")
        await self._crew.start(spec)
        for who, sees in (
            ("segment scheduler", probe.exists()),
            ("GPU actor", await self._crew.denoiser("sees", probe)),
        ):
            if not sees:
                raise ConfigError(
                    [f"output: the {who} does not see {spec.root}; choose a folder that all nodes of the cluster share"]
                )
        spec.folder.create(dump_yaml(spec.config))
        self._runs[spec.run_id] = _LiveRun(spec, spec.new_manifest(), spec.stream_files())
        await self._save(self._runs[spec.run_id])
        self._apply(RunSubmitted(spec.plan))

    async def status(self, run_id: str) -> RunStatus:
        run = self._find(run_id)
        progress = None if run.ended else await self._progress(run_id)
        return self._status(run, progress)

    async def runs(self) -> list[RunStatus]:
        """All runs that are remembered, in the order of submission."""
        return [self._status(run, None) for run in self._runs.values()]

    async def cancel(self, run_id: str) -> None:
        """Asks the run to stop; its committed segments stay. An ended run is left as it is."""
        self._find(run_id)
        self._apply(CancelAsked(run_id))

    async def wait_segment(self, run_id: str, segment_index: int, timeout_s: float) -> StreamReply:
        """Answers as soon as the segment is committed or the run has ended, after `timeout_s` in any case."""
        run = self._find(run_id)

        def there() -> bool:
            return segment_index < len(run.manifest.segments) or run.ended

        async with run.changed:
            try:
                await asyncio.wait_for(run.changed.wait_for(there), timeout_s)
            except TimeoutError:
                return StreamReply(None, self._status(run, None))
        segments = run.manifest.segments
        return StreamReply(segments[segment_index] if segment_index < len(segments) else None, self._status(run, None))

    def _find(self, run_id: str) -> _LiveRun:
        if run_id not in self._runs:
            known = ", ".join(list(self._runs)[-5:]) or "none"
            raise UnknownRun(f"no run {run_id!r} here; the latest are: {known}")
        return self._runs[run_id]

    def _status(self, run: _LiveRun, progress: Progress | None) -> RunStatus:
        manifest = run.manifest
        return RunStatus(
            run_id=manifest.run_id,
            state=self._live_state(run),
            path=str(run.spec.folder.path),
            committed=len(manifest.segments),
            num_segments=manifest.num_segments,
            num_frames=manifest.num_frames,
            error=manifest.error,
            progress=progress,
        )

    async def _progress(self, run_id: str) -> Progress | None:
        try:
            progress: Progress | None = await asyncio.wait_for(self._crew.denoiser("progress"), 1.0)
        except (ConnectionError, TimeoutError):  # it is being restarted
            return None
        return progress if progress and progress.run_id == run_id else None

    def _apply(self, event: Event) -> None:
        """The one place where the state machine is told something and obeyed."""
        for instruction in self._machine.handle(event):
            match instruction:
                case Work():
                    self._spawn(self._work(instruction))
                case StopWork(run_id):
                    self._spawn(self._stop(run_id))
                case CloseRun():
                    self._spawn(self._close(instruction))
        for run in self._runs.values():
            if self._live_state(run) != run.manifest.state:
                self._spawn(self._save(run))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, work: Work) -> None:
        run = self._runs[work.run_id]
        outcome: WorkDone | WorkFailed
        try:
            if work.attempt:
                await self._crew.start(run.spec)  # what failed may have been an actor's death
            await self._stages()[work.stage](run, work)
        except Exception as error:  # whatever it was, the state machine decides what follows
            outcome = WorkFailed(work.run_id, work.stage, work.segment_index, work.attempt, *_explain(error))
        else:
            outcome = WorkDone(work.run_id, work.stage, work.segment_index, work.attempt)
        self._apply(outcome)

    def _stages(self) -> dict[str, Callable[[_LiveRun, Work], Awaitable[None]]]:
        return {
            "prepare": self._prepare,
            "denoise": self._denoise,
            "decode": self._decode,
            "commit": self._commit,
            "finalize": self._finalize,
        }

    async def _prepare(self, run: _LiveRun, work: Work) -> None:
        await self._crew.denoiser("prepare_run", run.spec)

    async def _denoise(self, run: _LiveRun, work: Work) -> None:
        segment = _segment(run, work)
        figures = await self._crew.denoiser("denoise_segment", run.spec, segment, work.attempt)
        run.statistics[segment.index] = figures

    async def _decode(self, run: _LiveRun, work: Work) -> None:
        segment = _segment(run, work)
        run.statistics[segment.index] |= await self._crew.denoiser("decode_segment", run.spec, segment)

    async def _commit(self, run: _LiveRun, work: Work) -> None:
        """Latents and media are durable already: now what plays, then the manifest, then whoever waits."""
        segment, folder = _segment(run, work), run.spec.folder
        began = time.time()
        await asyncio.to_thread(run.stream.append, run.spec.part(segment))
        published = statistics(publish_at=began, publish_s=time.time() - began)
        record = SegmentRecord(
            index=segment.index,
            prompt=segment.prompt,
            seed=segment.seed,
            first_frame=segment.first_frame,
            num_frames=segment.num_frames,
            latents=folder.relative(folder.latents(segment.index)),
            media=folder.relative(folder.media(segment.index)),
            statistics=run.statistics[segment.index] | published,
        )
        await self._save(run, segments=(*run.manifest.segments, record))
        del run.statistics[segment.index]

    async def _finalize(self, run: _LiveRun, work: Work) -> None:
        await self._crew.denoiser("finalize_run", run.spec)

    async def _stop(self, run_id: str) -> None:
        await self._crew.denoiser("stop_run", run_id)

    async def _close(self, close: CloseRun) -> None:
        run = self._runs[close.run_id]
        final = run.spec.folder.relative(run.spec.folder.final) if close.state == "done" else None
        # Before anyone is told: whoever waits for the end may end the actors, and then nothing must be left behind.
        for call, method in ((self._crew.denoiser, "release_run"), (self._crew.store, "drop_run")):
            with contextlib.suppress(ConnectionError):  # it holds nothing then
                await call(method, close.run_id)
        with contextlib.suppress(OSError):  # an end must be told even where nothing can be written
            await asyncio.to_thread(run.stream.end)
        await self._save(run, state=close.state, error=close.error, final=final)
        self._forget_old_runs()
        self._spawn(self._exit_when_idle(run.spec.config.engine.idle_exit_s))

    async def _save(self, run: _LiveRun, **changes: Any) -> None:
        """Writes the manifest with these fields changed, and only then lets anybody see it."""
        async with run.saving:
            manifest = replace(run.manifest, **({"state": self._live_state(run)} | changes))
            await asyncio.to_thread(run.spec.folder.write_manifest, manifest)
            run.manifest = manifest
        async with run.changed:
            run.changed.notify_all()

    def _live_state(self, run: _LiveRun) -> RunState:
        """The state machine's word, except that an end is told only once it is durable."""
        state = self._machine.state(run.manifest.run_id)
        return run.manifest.state if state in (None, "done", "failed", "cancelled") else state

    def _forget_old_runs(self) -> None:
        ended = [run_id for run_id, run in self._runs.items() if run.ended]
        for run_id in ended[:-ENDED_RUNS_KEPT]:
            self._machine.forget(run_id)
            del self._runs[run_id]

    async def _exit_when_idle(self, idle_exit_s: float) -> None:
        use = self._last_use
        await asyncio.sleep(idle_exit_s)
        if self._machine.idle and use == self._last_use and not self._submitting.locked():
            await self._crew.end()


def _segment(run: _LiveRun, work: Work) -> SegmentPlan:
    assert work.segment_index is not None, f"{work.stage} without a segment"
    return run.spec.plan.segments[work.segment_index]


def _explain(error: Exception) -> tuple[str, bool]:
    """One sentence for the user, and whether trying again is pointless."""
    cause = getattr(error, "cause", None) or error
    sentence = str(cause).strip().splitlines()[0] if str(cause).strip() else "no message"
    ours = isinstance(cause, EditRayError)
    return (sentence if ours else f"{type(cause).__name__}: {sentence}"), ours and not isinstance(cause, _REPEATABLE)
