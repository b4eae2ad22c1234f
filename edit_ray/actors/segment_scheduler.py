"""The segment scheduler actor: carries out what the state machine says, keeps the manifests, answers clients."""

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

from edit_ray.actors.admission import Admission, Change, OnDamage, Submission, check_answers, denoised_before
from edit_ray.actors.best_effort import best_effort
from edit_ray.actors.changes import extension, reroll
from edit_ray.actors.closing import close_run, stop_work
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.messages import Progress, RunStatus, StreamReply, code_version
from edit_ray.actors.metrics_collector import MetricsCollector
from edit_ray.actors.places import LOOK_AGAIN_S, missing, usable_workers
from edit_ray.actors.pointers import Pointers
from edit_ray.actors.pool import ActorPool, Pointer
from edit_ray.actors.recovery import Recovery, WaitingRun
from edit_ray.actors.space import is_full
from edit_ray.actors.stages import Stages, explain
from edit_ray.actors.threads import disk_threads
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
IDLE_EXIT_S = EngineOptions().idle_exit_s  # of an incarnation that finds nothing to do

_log = logging.getLogger(__name__)


class SegmentSchedulerActor:
    """One event loop: `SegmentScheduler` decides, tasks carry out, their outcome is the next event.

    The truth about every run is in its folder. So an incarnation begins by asking the pool which runs were live, and
    goes on with each from there; whoever calls meanwhile waits.
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
        self._recovery = Recovery(pool, self._admission, self._come_back, self._forget)
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

    # What clients ask for.

    async def submit(
        self, run_id: str, config: dict[str, Any], root: str, probe: str, token: str, owner: str = "", job: str = ""
    ) -> RunStatus:
        """Queues a run whose folder is `root/run_id`; see `Submission`. The same submission again changes nothing.

        Raises ConfigError, RunExists, ResourcesUnavailable, ActorVersionMismatch; then nothing was written.
        """
        asked = Submission(run_id, Config.model_validate(config), Path(root), Path(probe), token, owner, job)
        async with self._admission_of(asked.root, asked.config.engine):
            await self._recovery.give_up_removed(asked)
            if (there := self._there(run_id)) is not None:
                if there.manifest is None or there.manifest.begun.submission != token:
                    raise _taken(there.folder)
                return await self._join(there)
            spec = await self._admission.check(asked)
            await self._metrics.serve(spec.config.metrics, spec.root)
            async with self._pointers.noted(run_id, Pointer(root)):
                if await self._admission.mine(asked):
                    return await self._live(await self._admission.go_on(spec.root, run_id))
                return await self._live(await self._admission.begin(spec, asked))

    async def resume(self, run_id: str, root: str, other_hardware: bool, remake_damaged: bool = False) -> RunStatus:
        """Goes on with a run at its first segment that is not committed; one that lives or is done is left as it is.

        With `remake_damaged`, committed files that are not as they were written are made again, also of a done run.
        Raises UnknownRun, RunLocked, ManifestUnreadable, ConfigError, HardwareDiffers, RunDamaged.
        """
        await self._recovered
        if self._there(run_id) is None:
            manifest = await asyncio.to_thread(RunFolder(Path(root), run_id).read_manifest)
            if manifest.state == "done" and len(manifest.segments) == manifest.num_segments and not remake_damaged:
                return RunStatus.of(Path(root, run_id), manifest)
        return await self._go_on(run_id, root, other_hardware, None, "remake" if remake_damaged else "refuse")

    async def extend(self, run_id: str, root: str, segments: int, allow_different_hardware: bool) -> RunStatus:
        """Gives an ended run more segments. Raises as `resume`, and RunLive."""
        return await self._go_on(run_id, root, allow_different_hardware, extension(segments))

    async def reroll(
        self,
        run_id: str,
        root: str,
        start: int,
        seed: int | None,
        prompt: str | None,
        allow_different_hardware: bool,
    ) -> RunStatus:
        """Makes an ended run's segments from `start` on again, in another take; the old one is kept.

        Raises as `extend`.
        """
        return await self._go_on(run_id, root, allow_different_hardware, reroll(start, seed, prompt))

    async def status(self, run_id: str) -> RunStatus:
        run = await self._find(run_id)
        return run.status if isinstance(run, WaitingRun) else await self._status(run)

    async def runs(self) -> list[RunStatus]:
        """All runs that are remembered, in the order of submission."""
        await self._recovered
        runs = self._recovery.waiting | self._runs
        return [self._status_without_progress(run) if isinstance(run, LiveRun) else run.status for run in runs.values()]

    async def cancel(self, run_id: str) -> None:
        """Asks the run to stop; its committed segments stay. An ended run is left as it is."""
        run = await self._find(run_id)
        if isinstance(run, WaitingRun):
            run.cancel()
        self._apply(CancelAsked(run_id))

    async def wait_segment(self, run_id: str, segment_index: int, timeout_s: float) -> StreamReply:
        """Answers as soon as the segment is committed or the run has ended, after `timeout_s` in any case.

        Who waits for a segment takes all before it as they come. Raises ConfigError where it can be no segment.
        """
        check_segment_index(segment_index)
        run = await self._find(run_id)
        if isinstance(run, WaitingRun):
            waiting = run
            await waiting.until(lambda: waiting.record(segment_index) is not None, timeout_s)
            if not waiting.over:
                return StreamReply(waiting.record(segment_index), waiting.status)
            run = self._known(run_id)

        def there() -> bool:
            taken = min(segment_index, len(run.manifest.segments))
            self._apply(Consumed(run_id, taken))
            self._metrics.taken(run_id, taken)
            return segment_index < len(run.manifest.segments) or run.ended

        with self._metrics.consumer():
            await run.wait(there, timeout_s)
        segments = run.manifest.segments
        record = segments[segment_index] if segment_index < len(segments) else None
        return StreamReply(record, self._status_without_progress(run))

    async def _find(self, run_id: str) -> LiveRun | WaitingRun:
        await self._recovered
        return self._there(run_id) or self._known(run_id)

    def _there(self, run_id: str) -> LiveRun | WaitingRun | None:
        """The run if it lives: at work, or waiting to be."""
        known = self._runs.get(run_id)
        return known if known is not None and not known.ended else self._recovery.waiting.get(run_id)

    def _known(self, run_id: str) -> LiveRun:
        if run_id not in self._runs:
            known = ", ".join(list(self._runs)[-5:]) or "none"
            raise UnknownRun(f"no run {run_id!r} here; the latest are: {known}")
        return self._runs[run_id]

    def _status_without_progress(self, run: LiveRun, progress: Progress | None = None) -> RunStatus:
        status = RunStatus.of(run.spec.folder.path, run.manifest, self._state(run), progress)
        error = status.error if run.unrecorded is None else run.unrecorded.error
        return replace(status, error=error, warning=run.warning, at_work=self._machine.at_work(run.spec.run_id))

    async def _status(self, run: LiveRun) -> RunStatus:
        progress: Progress | None = None
        if not run.ended and run.worker is not None:
            # An actor that is being started again says nothing.
            with contextlib.suppress(ConnectionError, TimeoutError):
                progress = await asyncio.wait_for(self._pool.denoiser(run.worker, "progress"), 1.0)
        mine = progress is not None and progress.run_id == run.spec.run_id
        return self._status_without_progress(run, progress if mine else None)

    def _state(self, run: LiveRun) -> RunState:
        """The state machine's word, except that an end is told only once it is durable."""
        if run.end is not None:
            return run.end.state
        return self._machine.state(run.spec.run_id) or "stopping"

    # How runs come and go.

    async def _recover(self) -> None:
        """Goes on with every run that an earlier incarnation was at work on, those first that have a GPU actor."""
        await self._metrics.forget_earlier()
        pointers = await self._recovery.recall()
        self._pointers.recalled(pointers)  # all of them until each is seen to: this incarnation may die meanwhile
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
        """Nothing is left to do for a run."""
        await self._pointers.forget(run_id)
        self._spawn(self._exit_when_idle(idle_exit_s))

    async def _go_on(
        self, run_id: str, root: str, other_hardware: bool, change: Change | None, damage: OnDamage = "refuse"
    ) -> RunStatus:
        async with self._admission_of(Path(root), EngineOptions()):
            if (there := self._there(run_id)) is not None:
                if there.folder.path.parent != Path(root):
                    raise _taken(there.folder)
                if change is not None:
                    raise RunLive(
                        f"run {run_id!r} is at work; wait for its end, or stop it with `edit-ray cancel {run_id}`"
                    )
                if isinstance(there, WaitingRun):
                    there.different_hardware |= other_hardware
                return await self._join(there)
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
        """Where a run stands that lives already; one that waits is tried now. Raises what keeps it from going on."""
        if isinstance(run, LiveRun):
            return await self._status(run)
        await run.try_now()
        if not run.over and run.error is not None:
            raise run.error
        return self._status_without_progress(self._known(run.run_id)) if run.over else run.status

    @contextlib.asynccontextmanager
    async def _admission_of(self, root: Path, engine: EngineOptions) -> AsyncIterator[None]:
        """One at a time comes in; where nothing has come of it the actors end themselves as ever."""
        await self._recovered
        await check_answers(root, engine.answer_timeout_s)  # or it would hold up everybody
        self._last_use += 1
        async with self._admitting:
            try:
                yield
            finally:
                if self._idle:
                    self._spawn(self._exit_when_idle(engine.idle_exit_s))

    async def _live(self, run: LiveRun, recovered: bool = False) -> RunStatus:
        """From here on the state machine has the run. Where that fails another process may open it."""
        spec, committed = run.spec, len(run.manifest.segments)
        try:
            denoised = await run.on_disk(denoised_before, spec, committed)
            usable = await usable_workers(self._pool, spec)
        except BaseException:
            await run.close()
            raise
        run.statistics |= dict(enumerate(denoised, committed))
        self._runs.pop(spec.run_id, None)  # of an earlier life
        self._runs[spec.run_id] = run
        self._metrics.opened(run, recovered=recovered)
        run.warnings["cluster"] = missing(spec, usable)
        self._apply(WorkersCounted(usable))
        self._apply(RunSubmitted(spec.plan, committed, committed + len(denoised), run.worked_on))
        self._spawn(self._count_again(run))
        return self._status_without_progress(run)

    async def _count_again(self, run: LiveRun) -> None:
        """While the run waits for a GPU actor, nodes may come."""
        while not run.ended:
            await asyncio.sleep(LOOK_AGAIN_S)
            if self._machine.state(run.spec.run_id) == "queued":
                usable = await usable_workers(self._pool, run.spec)
                run.warnings["cluster"] = missing(run.spec, usable)
                self._apply(WorkersCounted(usable))

    # What the state machine is told, and what it says.

    def _apply(self, event: Event) -> None:
        """The one place where the state machine is told something and obeyed."""
        for instruction in self._machine.handle(event):
            match instruction:
                case Work():
                    self._spawn(self._work(instruction))
                case StopWork(run_id, worker):
                    self._spawn(stop_work(self._pool, self._runs[run_id], worker, self._machine))
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
                if run.worker != work.worker:  # tried again with the next piece of work
                    await run.on_disk(partial(append_event, run.folder.events, "gpu_actor", worker=work.worker))
                    await self._pointers.note(work.run_id, Pointer(str(run.spec.root), work.worker, begun=True))
                    run.worker = work.worker
            with self._metrics.work(run, work):
                await self._stages.carry_out(run, work)
        except Exception as error:  # whatever it was, the state machine decides what follows
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
        await run.tell()

    async def _close(self, close: CloseRun) -> None:
        run = self._runs[close.run_id]
        await close_run(self._pool, self._stages.watchdog, run, close)
        self._metrics.ended(run)
        await self._forget(close.run_id, run.spec.config.engine.idle_exit_s)
        await run.tell()
        self._forget_old_runs()

    def _forget_old_runs(self) -> None:
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
    return RunExists(f"run id {folder.run_id!r} is taken by {folder.path}, and at work")
