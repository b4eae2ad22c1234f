"""The segment scheduler actor: runs the state machine, keeps the manifests, answers clients."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import traceback
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edit_ray.actors.admission import Admission, OnDamage, Submission, check_answers
from edit_ray.actors.folder_state import Change, denoised_before, extension, is_full, reroll
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.messages import Progress, RunStatus, StreamReply, code_version
from edit_ray.actors.metrics_collector import MetricsCollector
from edit_ray.actors.pool import ActorPool, Pointer
from edit_ray.actors.recovery import Pointers, Recovery, WaitingRun
from edit_ray.actors.stages import Stages, explain
from edit_ray.actors.watchdog import best_effort, disk_threads
from edit_ray.config import Config
from edit_ray.engine.options import EngineOptions
from edit_ray.errors import EditRayError, RunExists, RunLive, UnknownRun
from edit_ray.runs.event_log import append_event
from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    Consumed,
    Event,
    RunState,
    RunSubmitted,
    StopWork,
    Work,
    WorkDone,
    WorkersCounted,
    WorkFailed,
)
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import check_segment_index
from edit_ray.runs.scheduler import SegmentScheduler

ENDED_RUNS_KEPT = 100
COUNT_PLACES_S = 30.0  # between two counts of the nodes' places, while a run waits for a GPU actor
IDLE_EXIT_S = EngineOptions().idle_exit_s  # of an incarnation that finds no run

_log = logging.getLogger(__name__)


class SegmentSchedulerActor:
    """One event loop: `SegmentScheduler` decides, tasks carry out its instructions, their outcome is the next event.

    The state of every run is in its folder. An incarnation first asks the pool which runs were live, and resumes
    each from its folder; clients that call meanwhile wait.
    """

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self._admission, self._stages = Admission(pool), Stages(pool)
        self._machine = SegmentScheduler()
        self._runs: dict[str, LiveRun] = {}
        self._pointers = Pointers(pool)
        self._tasks: set[asyncio.Task[None]] = set()
        self._admitting = asyncio.Lock()
        self._last_use = 0
        self._recovery = Recovery(pool, self._admission, self._stages, self._come_back, self._forget)
        self._metrics = MetricsCollector(
            pool,
            lambda: [(run, self._state(run)) for run in self._runs.values() if not run.ended],
            lambda: len(self._recovery.waiting),
        )
        loop = asyncio.get_running_loop()
        loop.set_default_executor(disk_threads())
        self._recovered = loop.create_task(self._recover())

    async def describe(self) -> dict[str, str | int]:
        return {"version": code_version(), "pid": os.getpid()}

    # Calls of clients.

    async def submit(
        self, run_id: str, config: dict[str, Any], root: str, probe: str, token: str, owner: str = "", job: str = ""
    ) -> RunStatus:
        """Queue a run whose folder is `root/run_id`; see `Submission`. The same submission again changes nothing.

        Raises ConfigError, RunExists, ResourcesUnavailable, ActorVersionMismatch; then nothing was written.
        """
        asked = Submission(run_id, Config.model_validate(config), Path(root), Path(probe), token, owner, job)
        async with self._admission_of(asked.root, asked.config.engine):
            await self._recovery.give_up_removed(asked)
            if (alive := self._alive(run_id)) is not None:
                if alive.manifest is None or alive.manifest.begun.submission != token:
                    raise _taken(alive.folder)
                return await self._join(alive)
            spec = await self._admission.check(asked)
            await self._metrics.serve(spec.config.metrics, spec.root)
            async with self._pointers.noted(run_id, Pointer(root)):
                if await self._admission.mine(asked):
                    return await self._live(await self._admission.go_on(spec.root, run_id))
                return await self._live(await self._admission.begin(spec, asked))

    async def resume(self, run_id: str, root: str, other_hardware: bool, remake_damaged: bool = False) -> RunStatus:
        """Resume a run at its first uncommitted segment; a live or done run is left unchanged.

        With `remake_damaged`, committed files that are not as they were written are made again, also of a done run.
        Raises UnknownRun, RunLocked, ManifestUnreadable, ConfigError, HardwareDiffers, RunDamaged.
        """
        await self._recovered
        if self._alive(run_id) is None:
            manifest = await asyncio.to_thread(RunFolder(Path(root), run_id).read_manifest)
            if manifest.state == "done" and len(manifest.segments) == manifest.num_segments and not remake_damaged:
                return RunStatus.of(Path(root, run_id), manifest)
        return await self._go_on(run_id, root, other_hardware, None, "remake" if remake_damaged else "refuse")

    async def extend(self, run_id: str, root: str, segments: int, allow_different_hardware: bool) -> RunStatus:
        """Add segments to an ended run. Raises as `resume`, and RunLive."""
        return await self._go_on(run_id, root, allow_different_hardware, partial(extension, segments))

    async def reroll(
        self,
        run_id: str,
        root: str,
        start: int,
        seed: int | None,
        prompt: str | None,
        allow_different_hardware: bool,
    ) -> RunStatus:
        """Make an ended run's segments from `start` on in another take; the old one is kept. Raises as `extend`."""
        return await self._go_on(run_id, root, allow_different_hardware, partial(reroll, start, seed, prompt))

    async def status(self, run_id: str) -> RunStatus:
        run = await self._find(run_id)
        progress: Progress | None = None
        if isinstance(run, LiveRun) and not run.ended and run.worker is not None:
            with contextlib.suppress(ConnectionError, TimeoutError):  # an actor that is being restarted
                progress = await asyncio.wait_for(self._pool.denoiser(run.worker, "progress"), 1.0)
        return self._status(run, progress)

    async def runs(self) -> list[RunStatus]:
        """All known runs, in the order of submission."""
        await self._recovered
        return [self._status(run) for run in (self._recovery.waiting | self._runs).values()]

    async def cancel(self, run_id: str) -> None:
        """Stop a run between two steps; its committed segments stay. An ended run stays as it is."""
        run = await self._find(run_id)
        if isinstance(run, WaitingRun):
            run.cancel()
        self._apply(CancelAsked(run_id))

    async def wait_segment(self, run_id: str, segment_index: int, timeout_s: float) -> StreamReply:
        """Answer when the segment is committed or the run has ended, after `timeout_s` in any case.

        A client that waits for a segment consumes all before it. Raises ConfigError for an invalid index.
        """
        check_segment_index(segment_index)
        run = await self._find(run_id)
        if isinstance(run, WaitingRun):
            waiting = run
            await waiting.wait(lambda: waiting.over or waiting.record(segment_index) is not None, timeout_s)
            if not waiting.over:
                return StreamReply(waiting.record(segment_index), waiting.status)
            run = self._known(run_id)

        def there() -> bool:
            consumed = min(segment_index, len(run.manifest.segments))
            self._apply(Consumed(run_id, consumed))
            run.consumed = max(run.consumed, consumed)
            return segment_index < len(run.manifest.segments) or run.ended

        with self._metrics.consumer():
            await run.wait(there, timeout_s)
        segments = run.manifest.segments
        record = segments[segment_index] if segment_index < len(segments) else None
        return StreamReply(record, self._status(run))

    async def _find(self, run_id: str) -> LiveRun | WaitingRun:
        await self._recovered
        return self._alive(run_id) or self._known(run_id)

    def _alive(self, run_id: str) -> LiveRun | WaitingRun | None:
        """The run, if it is active or waits to be."""
        known = self._runs.get(run_id)
        return known if known is not None and not known.ended else self._recovery.waiting.get(run_id)

    def _known(self, run_id: str) -> LiveRun:
        if run_id not in self._runs:
            known = ", ".join(list(self._runs)[-5:]) or "none"
            raise UnknownRun(f"no run {run_id!r} here; the latest are: {known}")
        return self._runs[run_id]

    def _status(self, run: LiveRun | WaitingRun, progress: Progress | None = None) -> RunStatus:
        if isinstance(run, WaitingRun):
            return run.status
        if progress is not None and progress.run_id != run.spec.run_id:
            progress = None
        status = RunStatus.of(run.spec.folder.path, run.manifest, self._state(run), progress)
        error = status.error if run.unrecorded is None else run.unrecorded.error
        return replace(status, error=error, warning=run.warning, at_work=self._machine.at_work(run.spec.run_id))

    def _state(self, run: LiveRun) -> RunState:
        """The state machine's state, except that an end is reported only once it is durable."""
        if run.end is not None:
            return run.end.state
        return self._machine.state(run.spec.run_id) or "stopping"

    # How runs start and continue.

    async def _recover(self) -> None:
        """Resume every run of the last incarnation, starting with those that have a GPU actor."""
        await self._metrics.forget_earlier()
        pointers = await self._pointers.recall()
        ordered = dict(sorted(pointers.items(), key=lambda item: item[1].worker is None))
        await self._recovery.begin(ordered, self._spawn)
        self._spawn(self._metrics.serve_again(list(self._runs.values())))

    async def _come_back(self, run: LiveRun, waiting: WaitingRun) -> None:
        await self._live(run, recovered=True)
        if waiting.cancelled:
            self._apply(CancelAsked(waiting.run_id))
        if self._recovered.done():
            self._spawn(self._metrics.serve_again([run]))

    async def _forget(self, run_id: str, idle_exit_s: float = IDLE_EXIT_S) -> None:
        """A run needs no more work."""
        await self._pointers.forget(run_id)
        self._spawn(self._exit_when_idle(idle_exit_s))

    async def _go_on(
        self, run_id: str, root: str, other_hardware: bool, change: Change | None, damage: OnDamage = "refuse"
    ) -> RunStatus:
        async with self._admission_of(Path(root), EngineOptions()):
            if (alive := self._alive(run_id)) is not None:
                if alive.folder.path.parent != Path(root):
                    raise _taken(alive.folder)
                if change is not None:
                    raise RunLive(
                        f"run {run_id!r} is active; wait for it to end, or stop it with `edit-ray cancel {run_id}`"
                    )
                if isinstance(alive, WaitingRun):
                    alive.different_hardware |= other_hardware
                return await self._join(alive)
            async with self._pointers.noted(run_id, Pointer(root, begun=True)):
                run = await self._admission.go_on(
                    Path(root), run_id, allow_different_hardware=other_hardware, change=change, damage=damage
                )
                try:
                    await self._metrics.serve(run.spec.config.metrics, run.spec.root)
                except BaseException:
                    await run.close()
                    raise
                return await self._live(run)

    async def _join(self, run: LiveRun | WaitingRun) -> RunStatus:
        """The status of a run that is alive. One that waits is tried now; raises what keeps it from continuing."""
        if isinstance(run, WaitingRun):
            await run.try_now()
            if not run.over and run.error is not None:
                raise run.error
            if run.over:
                run = self._known(run.run_id)
        return self._status(run)

    @contextlib.asynccontextmanager
    async def _admission_of(self, root: Path, engine: EngineOptions) -> AsyncIterator[None]:
        """Admit one run at a time. If none is admitted the actors still end when idle."""
        await self._recovered
        await check_answers(root, engine.answer_timeout_s)  # or it would hold up all others
        self._last_use += 1
        async with self._admitting:
            try:
                yield
            finally:
                if self._idle:
                    self._spawn(self._exit_when_idle(engine.idle_exit_s))

    async def _live(self, run: LiveRun, recovered: bool = False) -> RunStatus:
        """Hand the run to the state machine. If that fails, another process may open it."""
        spec, committed = run.spec, len(run.manifest.segments)
        try:
            denoised = await run.on_disk(denoised_before, spec, committed)
            usable, warning = await self._admission.usable_workers(spec)
        except BaseException:
            await run.close()
            raise
        run.stats |= dict(enumerate(denoised, committed))
        self._runs.pop(spec.run_id, None)  # of an earlier life
        self._runs[spec.run_id] = run
        self._metrics.opened(run, recovered=recovered)
        run.warnings["cluster"] = warning
        self._apply(WorkersCounted(usable))
        self._apply(RunSubmitted(spec.plan, committed, committed + len(denoised), run.worked_on))
        self._spawn(self._count_again(run))
        return self._status(run)

    async def _count_again(self, run: LiveRun) -> None:
        """Count the places again while the run waits for a GPU actor: nodes may be added."""
        while not run.ended:
            await asyncio.sleep(COUNT_PLACES_S)
            if self._machine.state(run.spec.run_id) == "queued":
                usable, run.warnings["cluster"] = await self._admission.usable_workers(run.spec)
                self._apply(WorkersCounted(usable))

    # Events and instructions of the state machine.

    def _apply(self, event: Event) -> None:
        """Handle an event and carry out the instructions that follow: the only caller of the state machine."""
        for instruction in self._machine.handle(event):
            match instruction:
                case Work():
                    self._spawn(self._work(instruction))
                case StopWork():
                    self._spawn(self._stages.stop(self._runs[instruction.run_id], instruction, self._machine))
                case CloseRun():
                    self._spawn(self._close(instruction))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of the segment scheduler has failed", exc_info=error)

    async def _work(self, work: Work) -> None:
        run = self._runs[work.run_id]
        outcome: WorkDone | WorkFailed
        try:
            with best_effort(f"note the GPU actor of run {work.run_id}"):
                if run.worker != work.worker:  # retried with the next piece of work
                    await run.on_disk(partial(append_event, run.folder.events, "gpu_actor", worker=work.worker))
                    await self._pointers.note(work.run_id, Pointer(str(run.spec.root), work.worker, begun=True))
                    run.worker = work.worker
            with self._metrics.work(run, work):
                await self._stages.carry_out(run, work)
        except Exception as error:  # the state machine decides what follows
            sentence, kind = await explain(error, run)
            _log.warning("%s of run %s, segment %s: %s", work.stage, work.run_id, work.segment_index, sentence)
            if not isinstance(error, EditRayError | ConnectionError) and not is_full(error):
                _log.warning("%s", "".join(traceback.format_exception(error)))
            if kind == "no place":
                run.worker, run.warnings["place"] = None, sentence
            outcome = WorkFailed(work, sentence, kind)
        else:
            run.warnings.pop("place", None)
            outcome = WorkDone(work)
        self._apply(outcome)
        await run.notify()

    async def _close(self, close: CloseRun) -> None:
        run = self._runs[close.run_id]
        await self._stages.close(run, close)
        self._metrics.ended(run)
        await self._forget(close.run_id, run.spec.config.engine.idle_exit_s)
        await run.notify()
        ended = [run_id for run_id, run in self._runs.items() if run.ended]
        for run_id in ended[:-ENDED_RUNS_KEPT]:
            del self._runs[run_id]

    @property
    def _idle(self) -> bool:
        return self._machine.idle and not self._recovery.waiting

    async def _exit_when_idle(self, idle_exit_s: float) -> None:
        use = self._last_use
        await asyncio.sleep(idle_exit_s)
        if self._idle and use == self._last_use and not self._admitting.locked():
            self._metrics.close()
            await self._pool.end()


def _taken(folder: RunFolder) -> RunExists:
    return RunExists(f"run id {folder.run_id!r} is taken by {folder.path}, and active")
