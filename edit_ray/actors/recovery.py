"""Takes over the runs of a dead segment scheduler: retries each until it continues here, has ended or is cancelled.

Each run is tried by itself, again and again with a growing pause. So a lock that a dead node still holds, an actor that
is being restarted, or a file system that is away for a while loses no run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edit_ray.actors.admission import Admission, Submission
from edit_ray.actors.live_run import LiveRun, Watched
from edit_ray.actors.messages import RunSpec, RunStatus
from edit_ray.actors.pool import ActorPool, Pointer
from edit_ray.actors.stages import Stages, pause_before
from edit_ray.actors.watchdog import best_effort, in_own_thread
from edit_ray.config import load_config
from edit_ray.errors import UnknownRun
from edit_ray.runs.events import RunState
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Ended, Manifest, SegmentRecord
from edit_ray.runs.manifest_file import ManifestReader

FIRST_TRIES_S = 15.0  # that clients wait for the first tries of all runs together
ASKED_TRY_S = 60.0  # that a client waits for a try that it has asked for
SILENT_S = 1.0  # between two checks whether a run whose folder does not answer was cancelled

_log = logging.getLogger(__name__)


class Pointers:
    """The folder and GPU actor of each live run. The pool keeps every change for the next incarnation."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self._known: dict[str, Pointer] = {}
        self._writing = asyncio.Lock()

    async def recall(self) -> dict[str, Pointer]:
        """The pointers of the last incarnation, kept until each run is forgotten: this one may die meanwhile, too.

        The scheduler cannot begin without them, so this is retried until the pool answers.
        """
        for attempt in itertools.count(1):
            with best_effort("recall which runs were live"):
                self._known |= {run_id: Pointer(*value) for run_id, value in (await self._pool.recall()).items()}
                break
            await asyncio.sleep(pause_before(attempt))
        return dict(self._known)

    async def note(self, run_id: str, pointer: Pointer) -> None:
        self._known[run_id] = pointer
        async with self._writing:
            await self._pool.remember(dict(self._known))

    async def forget(self, run_id: str) -> None:
        """Remove the pointer of a run that needs no more work."""
        self._known.pop(run_id, None)
        with best_effort(f"note that run {run_id} has ended"):
            async with self._writing:
                await self._pool.remember(dict(self._known))

    @contextlib.asynccontextmanager
    async def noted(self, run_id: str, pointer: Pointer) -> AsyncIterator[None]:
        """Write the pointer before the block creates or opens the run's folder; forget it if the block fails."""
        try:
            await self.note(run_id, pointer)
            yield
        except BaseException:
            await self.forget(run_id)
            raise
        if not pointer.begun:
            with best_effort(f"note that run {run_id} has begun"):
                await self.note(run_id, self._known[run_id]._replace(begun=True))


@dataclass
class WaitingRun(Watched):
    """A run that cannot continue yet, and why. `manifest` is what was read of it last."""

    run_id: str
    pointer: Pointer
    error: Exception | None = None
    manifest: Manifest | None = None
    reader: ManifestReader = field(init=False)
    different_hardware: bool = False
    cancelled: bool = False
    removed: bool = False  # its folder, although the file system that held it answers
    over: bool = False  # the wait, not the run: it works, has ended, or was never begun
    begun: int = 0  # the number of the latest try
    tried: int = 0  # the number of the latest try that is over
    wanted: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.reader = ManifestReader(self.folder.manifest)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.pointer.root), self.run_id)

    @property
    def status(self) -> RunStatus:
        """The run's status; `warning` says why it waits. Counts are 0 until its manifest has been read."""
        state: RunState = "stopping" if self.cancelled else "waiting"
        reason = "the segment scheduler was started again and has not opened the run yet"
        if self.error is not None:
            sentence = (str(self.error).strip() or type(self.error).__name__).splitlines()[0]
            reason = f"the run cannot continue yet and is being retried: {sentence}"
        if self.manifest is None:
            return RunStatus(self.run_id, state, str(self.folder.path), warning=reason)
        return replace(RunStatus.of(self.folder.path, self.manifest, state), warning=reason)

    def record(self, segment_index: int) -> SegmentRecord | None:
        """The segment, if it is known to be committed."""
        segments = () if self.manifest is None else self.manifest.segments
        return segments[segment_index] if segment_index < len(segments) else None

    def cancel(self) -> None:
        self.cancelled = True
        self.wanted.set()

    async def try_now(self) -> None:
        """Wait for a try that begins after this call."""
        asked = self.begun + 1
        self.wanted.set()
        await self.wait(lambda: self.over or self.tried >= asked, ASKED_TRY_S)


class Recovery:
    """Owns the runs that wait. `come_back` takes over a run that can continue, `forget` one that needs no more work."""

    def __init__(
        self,
        pool: ActorPool,
        admission: Admission,
        stages: Stages,
        come_back: Callable[[LiveRun, WaitingRun], Awaitable[None]],
        forget: Callable[[str], Awaitable[None]],
    ) -> None:
        self._pool, self._admission, self._stages = pool, admission, stages
        self._come_back, self._forget = come_back, forget
        self.waiting: dict[str, WaitingRun] = {}

    async def begin(self, pointers: dict[str, Pointer], spawn: Callable[[Awaitable[None]], None]) -> None:
        """Start to recover the runs. Returns when each was tried, after `FIRST_TRIES_S` in any case."""
        self.waiting |= {run_id: WaitingRun(run_id, pointer) for run_id, pointer in pointers.items()}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FIRST_TRIES_S
        for run in [self.waiting[run_id] for run_id in pointers]:  # one by one: they are queued in this order
            spawn(self._recover(run))
            await run.wait(lambda run=run: run.tried > 0, max(0.0, deadline - loop.time()))  # type: ignore[misc]

    async def give_up_removed(self, asked: Submission) -> None:
        """Free the run id of a submission if the run that waits under it was removed.

        The probe shows that the file system is there: a folder that is missing now will not reappear with it.
        """
        run = self.waiting.get(asked.run_id)
        if run is None or run.folder.path.parent != asked.root:
            return
        if await asyncio.to_thread(asked.probe.exists) and not await asyncio.to_thread(run.folder.path.exists):
            run.removed = True
            await run.try_now()

    async def _recover(self, run: WaitingRun) -> None:
        while not run.over:
            run.wanted.clear()
            run.begun += 1
            try:
                await self._try(run)
                run.over = True
            except Exception as error:  # any error may be temporary
                _log.warning("run %s cannot continue yet: %s: %s", run.run_id, type(error).__name__, error)
                run.error = error
            run.tried = run.begun
            if run.over:
                del self.waiting[run.run_id]
            await run.notify()
            if not run.over:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(run.wanted.wait(), pause_before(run.tried))

    async def _try(self, run: WaitingRun) -> None:
        reading = asyncio.ensure_future(in_own_thread(run.folder.read_manifest, run.reader))
        while not (await asyncio.wait({reading}, timeout=SILENT_S))[0]:
            if run.cancelled:  # no end can be written to a hung folder: `resume` still works
                return await self._forget(run.run_id)
        try:
            run.manifest = reading.result()
        except UnknownRun:
            if run.pointer.begun and not run.cancelled and not run.removed:
                raise  # the folder existed: its file system may be away
            return await self._forget(run.run_id)  # its client asks again
        if run.manifest.end is None:
            if not run.cancelled:
                live = await self._admission.go_on(
                    Path(run.pointer.root),
                    run.run_id,
                    allow_different_hardware=run.different_hardware,
                    reader=run.reader,
                )
                return await self._come_back(live, run)
            await self._cancel(run)
        return await self._forget(run.run_id)

    async def _cancel(self, run: WaitingRun) -> None:
        """Record the end. If that fails, the run can still be resumed."""
        with best_effort(f"record the end of run {run.run_id}"):
            file = await self._admission.open(run.folder, run.reader)
            try:
                await asyncio.to_thread(file.append, Ended(file.manifest.incarnation, "cancelled"))
            finally:
                file.close()
        with best_effort(f"free what run {run.run_id} has left in memory and on disk"):
            if run.pointer.worker is not None and run.manifest is not None:
                config = await asyncio.to_thread(load_config, run.folder.run_yaml, (), check_model=False)
                spec = RunSpec.of(Path(run.pointer.root), config, run.manifest)
                await self._pool.start(spec, run.pointer.worker)
                await self._stages.release(spec, run.pointer.worker)
