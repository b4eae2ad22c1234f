"""The segment scheduler actor: answers clients, admits runs; `work_loop` works on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

from edit_ray.actors import steering
from edit_ray.actors.admission import OnDamage, Submission, check_answers
from edit_ray.actors.branches import BranchAsked
from edit_ray.actors.folder_state import Change, extension, reroll, usable_disk
from edit_ray.actors.live_run import LiveRun
from edit_ray.actors.messages import Progress, RunStatus, StreamReply, code_version, has_ended
from edit_ray.actors.pool import ActorPool, Pointer
from edit_ray.actors.recovery import WaitingRun
from edit_ray.actors.watchdog import best_effort, disk_threads
from edit_ray.actors.work_loop import WorkLoop
from edit_ray.config import Config, read_edit
from edit_ray.engine.options import EngineOptions
from edit_ray.errors import ConfigError, ResourcesUnavailable, RunExists, RunLive, UnknownRun
from edit_ray.runs.events import (
    CancelAsked,
    Consumed,
)
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import MAX_REQUEST, check_segment_index
from edit_ray.runs.manifest import Ended, Opened
from edit_ray.runs.run_plan import Edit


class SegmentSchedulerActor(WorkLoop):
    """What clients call. The calls wait until the runs that were live before are resumed."""

    def __init__(self, pool: ActorPool) -> None:
        asyncio.get_running_loop().set_default_executor(disk_threads())
        super().__init__(pool)

    async def describe(self) -> dict[str, str | int]:
        return {"version": code_version(), "pid": os.getpid()}

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
        """Make an ended or held run's segments from `start` on in another take; the old one is kept.

        Raises as `extend`.
        """
        change = partial(reroll, start, seed, prompt)
        await self._recovered
        alive = self._alive(run_id)
        if isinstance(alive, LiveRun) and alive.folder.path.parent == Path(root) and self._waits(run_id):
            async with alive.steering:  # so that it still waits
                return await self._change_held(alive, change)
        return await self._go_on(run_id, root, allow_different_hardware, change)

    async def steer(self, run_id: str, from_segment: int | None, said: dict[str, Any], request: str) -> Edit:
        """Edit the storyboard of an active run, durably; return the edit with its first segment.

        Raises UnknownRun, RunEnded, ConfigError, ModelError, ResourcesUnavailable.
        """
        if not 0 < len(request) <= MAX_REQUEST:
            raise ConfigError([f"request has {len(request)} characters; it must have 1 to {MAX_REQUEST}"])
        run = await self._active(run_id)
        checked = await asyncio.to_thread(read_edit, run.spec.config, said)
        await self._steer(run, steering.edit(from_segment, checked, request))
        edit = steering.edit_for(run.manifest, request)
        assert edit is not None, "it was written"
        return edit

    async def pause(self, run_id: str, paused: bool) -> RunStatus:
        """Let no further segment of an active run begin, durably, or let them begin again. Raises as `steer`."""
        run = await self._active(run_id)
        await self._steer(run, steering.pause(paused))
        return self._status(run)

    async def approve(self, run_id: str, segment: int | None) -> RunStatus:
        """Approve the segments of an active run up to this one, by default the latest. Raises as `steer`."""
        run = await self._active(run_id)
        await self._steer(run, steering.approve(segment))
        return self._status(run)

    async def branch(
        self,
        run_id: str,
        root: str,
        source: str,
        at: int,
        said: dict[str, Any],
        num_segments: int | None,
        allow_different_hardware: bool,
        token: str,
        owner: str = "",
        job: str = "",
    ) -> RunStatus:
        """Queue a new run that shares the segments before `at` of the run `source`; see `BranchAsked`.

        The same request again changes nothing. Raises as `Admission.branch`.
        """
        asked = BranchAsked(run_id, Path(root), source, at, token, said, num_segments, owner, job)
        async with self._admission_of(asked.root, EngineOptions()):
            if (alive := self._alive(run_id)) is not None:
                if alive.manifest is None or alive.manifest.begun.submission != token:
                    raise _taken(alive.folder)
                return await self._join(alive)
            mine, folder = await self._admission.mine(asked), RunFolder(asked.root, run_id)
            if mine and (manifest := await asyncio.to_thread(folder.read_manifest)).end is not None:
                return RunStatus.of(folder.path, manifest)
            async with self._pointers.noted(run_id, Pointer(root)):
                if mine:
                    return await self._live(await self._admission.go_on(asked.root, run_id))
                run = await self._admission.branch(asked, allow_different_hardware=allow_different_hardware)
                with best_effort(f"show the metrics of run {run_id}"):
                    await self._metrics.serve(run.spec.config.metrics, run.spec.root)
                return await self._live(run)

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

    async def _active(self, run_id: str) -> LiveRun:
        """A run that can be steered. One that waits is tried now."""
        run = await self._find(run_id)
        if isinstance(run, WaitingRun):
            await run.try_now()
            if not run.over:
                raise ResourcesUnavailable(f"{run.status.warning}; ask again")
            run = self._known(run_id)
        if self._machine.begun(run_id) is None:
            raise has_ended(self._status(run))
        return run

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

    # How runs start and continue.

    async def _go_on(
        self, run_id: str, root: str, other_hardware: bool, change: Change | None, damage: OnDamage = "refuse"
    ) -> RunStatus:
        async with self._admission_of(Path(root), EngineOptions()):
            if (alive := self._alive(run_id)) is not None:
                if alive.folder.path.parent != Path(root):
                    raise _taken(alive.folder)
                if change is not None:
                    raise _live(run_id)
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

    def _waits(self, run_id: str) -> bool:
        """Whether a run waits for a word of a client, with nothing in flight."""
        return not self._machine.at_work(run_id) and self._machine.held_by(run_id) in ("pause", "approval")

    async def _change_held(self, run: LiveRun, change: Change) -> RunStatus:
        """Open the next incarnation of a run that waits, as it would be opened had it ended."""
        spec, run_id = run.spec, run.spec.run_id
        changed = await asyncio.to_thread(change, run.manifest, spec)
        if not self._waits(run_id) or self._runs.get(run_id) is not run:
            raise _live(run_id)
        worker = run.worker
        if worker is not None:
            with best_effort(f"free what run {run_id} has left in memory and on disk"):
                await self._stages.release(spec, worker)
        opened = Opened(spec.incarnation + 1, run.manifest.provenance, False, changed, secrets.token_hex(4))
        with usable_disk(spec.root):
            await run.append(opened)
        if not self._withdraw(run_id):
            raise has_ended(self._status(run))
        again = LiveRun(run.spec, run.file, worked_on=worker, may_move=run.may_move, changed=run.changed)
        try:
            return await self._live(again)
        except BaseException:
            run.unrecorded = Ended(run.spec.incarnation, "cancelled")  # nobody works on it: it can be resumed
            raise

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


def _live(run_id: str) -> RunLive:
    return RunLive(f"run {run_id!r} is active; wait for it to end, or stop it with `edit-ray cancel {run_id}`")


def _taken(folder: RunFolder) -> RunExists:
    return RunExists(f"run id {folder.run_id!r} is taken by {folder.path}, and active")
