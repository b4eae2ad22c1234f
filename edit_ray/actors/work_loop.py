"""The runs that a segment scheduler works on: applies events to the state machine, carries out what it instructs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from edit_ray.actors.admission import Admission
from edit_ray.actors.folder_state import denoised_before, is_full, usable_disk
from edit_ray.actors.live_run import FolderSilent, LiveRun
from edit_ray.actors.messages import Progress, RunStatus, has_ended
from edit_ray.actors.metrics_collector import MetricsCollector
from edit_ray.actors.pool import ActorPool, Pointer
from edit_ray.actors.recovery import Pointers, Recovery, WaitingRun
from edit_ray.actors.stages import Stages, explain
from edit_ray.actors.steering import Said
from edit_ray.actors.watchdog import best_effort
from edit_ray.engine.options import EngineOptions
from edit_ray.errors import ConfigError, EditRayError, ResourcesUnavailable
from edit_ray.runs.event_log import append_event
from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    Event,
    Instruction,
    RunState,
    RunSubmitted,
    Steered,
    StopWork,
    Work,
    WorkDone,
    WorkersCounted,
    WorkFailed,
)
from edit_ray.runs.manifest import Steering
from edit_ray.runs.scheduler import SegmentScheduler

ENDED_RUNS_KEPT = 100
COUNT_PLACES_S = 30.0  # between two counts of the nodes' places, while a run waits for a GPU actor
IDLE_EXIT_S = EngineOptions().idle_exit_s  # of an incarnation that finds no run

_log = logging.getLogger(__name__)


class WorkLoop:
    """One event loop: `SegmentScheduler` decides, tasks carry out its instructions, their outcome is the next event.

    The state of every run is in its folder. An incarnation first asks the pool which runs were live, and resumes
    each from its folder.
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
        self._recovered = asyncio.get_running_loop().create_task(self._recover())

    def _status(self, run: LiveRun | WaitingRun, progress: Progress | None = None) -> RunStatus:
        if isinstance(run, WaitingRun):
            return run.status
        if progress is not None and progress.run_id != run.spec.run_id:
            progress = None
        status = RunStatus.of(run.spec.folder.path, run.manifest, self._state(run), progress)
        error = status.error if run.unrecorded is None else run.unrecorded.error
        held_by = self._machine.held_by(run.spec.run_id)
        if held_by == "pause" and not run.manifest.paused:  # for as long as an edit is being written
            held_by = None
        at_work = self._machine.at_work(run.spec.run_id)
        return replace(status, error=error, warning=run.warning, at_work=at_work, held_by=held_by)

    def _state(self, run: LiveRun) -> RunState:
        """The state machine's state, except that an end is reported only once it is durable."""
        if run.end is not None:
            return run.end.state
        return self._machine.state(run.spec.run_id) or "stopping"

    # How runs become live.

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
        held = run.manifest.paused, run.manifest.approved
        self._apply(RunSubmitted(spec.plan, committed, committed + len(denoised), run.worked_on, *held))
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
        """Handle an event and carry out the instructions that follow."""
        self._carry_out(self._machine.handle(event))

    def _withdraw(self, run_id: str) -> bool:
        """Take a run with nothing in flight from the state machine without ending it; False where it has ended."""
        close = self._machine.handle(CancelAsked(run_id))
        self._carry_out(close[1:])
        return bool(close)

    def _carry_out(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Work():
                    self._spawn(self._work(instruction))
                case StopWork():
                    self._spawn(self._stages.stop(self._runs[instruction.run_id], instruction, self._machine))
                case CloseRun():
                    self._spawn(self._close(instruction))

    async def _steer(self, run: LiveRun, said: Said) -> None:
        """Write a line that steers a run; meanwhile nothing begins that has not begun.

        Raises RunEnded, ResourcesUnavailable where the folder refuses the line or does not answer, and as `said` does.
        """
        run_id = run.spec.run_id
        await run.steering.acquire()
        known = True  # what the manifest says
        try:
            if run.ended or (begun := self._machine.begun(run_id)) is None:
                raise has_ended(self._status(run))
            if self._runs.get(run_id) is not run:
                raise ResourcesUnavailable(f"run {run_id!r} was re-rolled meanwhile; ask again")
            self._apply(Steered(run_id, True, run.manifest.approved))
            if (line := await self._line(run, said, begun)) is not None:
                known = False
                with usable_disk(run.spec.root):
                    await run.append(line)
                known = True
        except FolderSilent as silent:
            raise ResourcesUnavailable(f"{silent}; what was asked may be done once it answers") from None
        except Exception as error:
            if run.ended and not known:
                raise has_ended(self._status(run)) from error
            raise
        finally:
            if known:
                self._let_go(run)
            else:
                self._spawn(self._let_go_when_known(run))

    async def _line(self, run: LiveRun, said: Said, begun: int) -> Steering | None:
        """The line that `said` makes. It is refused only once the line that is being synced is known here: clients may
        have read that already.
        """
        try:
            return said(run, begun)
        except ConfigError:
            with contextlib.suppress(FolderSilent, RuntimeError):  # the latter where the run ends meanwhile
                await run.on_disk(lambda: None)
        if run.ended or (now := self._machine.begun(run.spec.run_id)) is None:
            raise has_ended(self._status(run))
        return said(run, now)

    async def _let_go_when_known(self, run: LiveRun) -> None:
        """The line may be written yet, while the folder does not answer: only then is it known what holds."""
        while not run.ended:
            with contextlib.suppress(FolderSilent, RuntimeError):  # the latter where the run ends meanwhile
                await run.on_disk(lambda: None)
                break
        self._let_go(run)

    def _let_go(self, run: LiveRun) -> None:
        run.steering.release()
        if self._runs.get(run.spec.run_id) is run:
            if not run.ended:
                run.follow()
            self._apply(Steered(run.spec.run_id, run.manifest.paused, run.manifest.approved))

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
