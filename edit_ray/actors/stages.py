"""Carries out the state machine's instructions: calls the actors, commits results, and says which failures to retry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from edit_ray import files
from edit_ray.actors.folder_state import check_same, differing, is_full, shortage_after
from edit_ray.actors.live_run import FolderSilent, LiveRun
from edit_ray.actors.messages import RunSpec, rounded
from edit_ray.actors.pool import ActorGone, ActorPool, NoAnswer, NotStarted
from edit_ray.actors.watchdog import Watchdog, answered, best_effort
from edit_ray.config.causal_checks import guidance_warning
from edit_ray.config.model_checks import training_warning
from edit_ray.errors import (
    EditRayError,
    EntryLost,
    HostMemoryShort,
    NoPlace,
    NotAdopted,
    OutOfMemory,
    ResourcesUnavailable,
    RunCancelled,
    RunDamaged,
    SegmentFailed,
    StaleLease,
    StaleWork,
    StoreDied,
)
from edit_ray.runs.causal_plan import ChunkSizes, segments_seen
from edit_ray.runs.events import CloseRun, FailureKind, StopWork, Work
from edit_ray.runs.manifest import Committed, Dropped, Ended, HardwareChanged, SegmentRecord, Tiled
from edit_ray.runs.retention import retention
from edit_ray.runs.run_plan import SegmentPlan
from edit_ray.runs.scheduler import SegmentScheduler
from edit_ray.video.encode import EncoderKilled
from edit_ray.video.fragments import Part

_log = logging.getLogger(__name__)
_DIGEST = "_xxh3"  # ends the names of statistics that are digests of files

# Errors of ours that another attempt may not meet again.
_REPEATABLE = (SegmentFailed, RunCancelled, EntryLost, StaleLease, StaleWork, NotAdopted, ResourcesUnavailable)

# What the death of an actor, or of the encoder, leads to.
_DEATHS = (ActorGone, StoreDied, StaleLease, NotAdopted, EncoderKilled)

RETRY_PAUSE_S, LONGEST_RETRY_PAUSE_S = 1.0, 30.0  # the first pause, and the limit of doubling it
RELEASE_PAUSE_S = 1.0  # between two calls to a store that is being restarted


def pause_before(attempt: int) -> float:
    """Seconds to wait before a retry (attempt 1 is the first).

    What made the work fail may last: actors outlive their dead node by up to two seconds, and answer meanwhile.
    """
    return min(RETRY_PAUSE_S * 2.0 ** min(attempt - 1, 10), LONGEST_RETRY_PAUSE_S) if attempt else 0.0


class Stages:
    """Carries out each instruction of the state machine by one call of `carry_out`, `stop` or `close`."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self._watchdog = Watchdog(pool)

    async def carry_out(self, run: LiveRun, work: Work) -> None:
        """Return when the work is done; raise whatever makes it fail."""
        await asyncio.sleep(pause_before(work.attempt))
        if work.attempt:
            await run.on_disk(lambda: None)  # a folder that did not answer may still be at the failed work
        if work.attempt or work.stage == "prepare":
            await self._begin(run, work)  # the failure may have been an actor's death
        stage = getattr(self, f"_{work.stage}")
        try:
            await stage(run, work)
        except NotAdopted:  # its actor was restarted between two calls
            await self._begin(run, work)
            await stage(run, work)

    async def _begin(self, run: LiveRun, work: Work) -> None:
        """Ensure that the run's actors are alive, on the hardware that its manifest names, and have adopted the run.

        Raises HardwareDiffers if segments were made on other hardware, unless the run may move.
        """
        await self._pool.start(run.spec, work.worker)
        self._watchdog.started(work.worker)
        async with run.beginning:
            engine = run.spec.config.engine
            asked = self._pool.denoiser(work.worker, "provenance", run.spec)
            here = await answered(asked, engine.load_timeout_s, "what the GPU actor runs on")
            made = max(run.stats, default=len(run.manifest.segments) - 1) + 1  # segments that have latents
            if made and not run.may_move:
                check_same(run.spec.run_id, run.manifest.provenance, here)
            if differing(run.manifest.provenance, here):
                await run.append(HardwareChanged(run.spec.incarnation, here, made))
            adopted = self._pool.denoiser(work.worker, "adopt_run", run.spec)
            await answered(adopted, engine.answer_timeout_s, "the adoption of the run")

    async def _ask(self, run: LiveRun, work: Work, method: str, *arguments: Any) -> dict[str, float]:
        """Have the GPU actor do a piece of work; returns its statistics."""
        call = self._pool.denoiser(work.worker, method, run.spec, *arguments)
        stats: dict[str, float] = await self._watchdog.watch(work.worker, call, run.spec.config.engine)
        return stats

    async def _prepare(self, run: LiveRun, work: Work) -> None:
        prepared = await self._ask(run, work, "prepare_run")
        run.lookback_latents = int(prepared["lookback_latents"])
        sizes = ("chunk_size", "window", "sink")
        run.window = ChunkSizes(*(int(prepared[name]) for name in sizes)) if "window" in prepared else None
        run.warnings["guidance"] = guidance_warning(run.spec.config)
        run.warnings["training"] = await run.on_disk(training_warning, run.spec.config)
        await self._remake_damaged(run, work)
        first = run.manifest.dropped_before
        parts = [Part(at.media, at.first_frame, at.num_frames) for at in run.manifest.segments[first:]]
        await run.on_disk(partial(run.stream.rebuild, anew=run.remakes), parts, first)

    async def _remake_damaged(self, run: LiveRun, work: Work) -> None:
        """Make damaged files of committed segments again; their bytes must be those that were committed.

        Raises RunDamaged if they are not, or if the latents depend on residuals of other segments.
        """
        spec = run.spec
        if spec.folder.init in run.damaged:
            await run.on_disk(files.remove, spec.folder.init)  # the segment that needs it writes it
        for index in sorted({index for index, _ in run.damaged.values()}):
            segment, record = spec.segment(index), run.manifest.segments[index]
            stats: dict[str, float] = {}
            again = f"`edit-ray reroll {spec.run_id} --from {index}` makes it and what follows again"
            if spec.latents(index) in run.damaged:
                if spec.config.cache.reuse_window:
                    raise RunDamaged(f"{record.latents} depends on residuals of other segments; {again}")
                stats |= await self._ask(run, work, "denoise_segment", segment, work.attempt)
            if {spec.media(index), spec.folder.init} & run.damaged.keys():
                stats |= await self._ask(run, work, "encode_segment", segment)
            made = digests_in(stats)
            if changed := [name for name in made if made[name] != record.digests.get(name, made[name])]:
                raise RunDamaged(f"segment {index} was made again, and has other {' and '.join(changed)}; {again}")
        run.damaged = {}

    async def _denoise(self, run: LiveRun, work: Work) -> None:
        segment = _segment(run, work)
        run.stats[segment.index] = await self._ask(run, work, "denoise_segment", segment, work.attempt)

    async def _decode(self, run: LiveRun, work: Work) -> None:
        """Decode; if GPU memory runs out, once more in tiles, after the manifest says that the run is tiled."""
        segment = _segment(run, work)
        try:
            stats = await self._ask(run, work, "decode_segment", segment)
        except OutOfMemory:
            spec, index = run.spec, segment.index
            if spec.tiled(index) or spec.config.engine.tiled_decode == "never":
                raise
            _log.warning("run %s is decoded in tiles from segment %d on", spec.run_id, index)
            await run.append(Tiled(spec.incarnation, index))
            stats = await self._ask(run, work, "decode_segment", segment)
        run.stats[segment.index] |= stats

    async def _encode(self, run: LiveRun, work: Work) -> None:
        segment = _segment(run, work)
        stats = await self._ask(run, work, "encode_segment", segment)
        run.stats[segment.index] |= stats

    async def _commit(self, run: LiveRun, work: Work) -> None:
        """Latents and media are durable: now the stream's files, then the manifest's line, which is the commit."""
        segment, spec = _segment(run, work), run.spec
        if segment.index == len(run.manifest.segments):  # else this repeats a commit whose line was written
            publish_at, began = time.time(), time.perf_counter()
            await run.on_disk(run.stream.append, spec.part(segment))
            published = rounded(publish_at=publish_at, publish_s=time.perf_counter() - began)
            stats = run.stats.get(segment.index, {})
            names = ("index", "take", "prompt", "seed", "first_frame", "num_frames")
            record = SegmentRecord(
                **{name: getattr(segment, name) for name in names},
                latents=spec.folder.relative(spec.latents(segment.index)),
                media=spec.folder.relative(spec.media(segment.index)),
                statistics={name: value for name, value in stats.items() if not name.endswith(_DIGEST)} | published,
                digests=digests_in(stats),
            )
            await run.append(Committed(spec.incarnation, record))
        run.stats.pop(segment.index, None)
        await self._clean_up(run)

    async def _clean_up(self, run: LiveRun) -> None:
        """Remove old files, and forecast the disk space. What fails here is repeated after the next commit."""
        with best_effort(f"drop old segments of run {run.spec.run_id}"):
            await self._drop_old_segments(run)
        with best_effort(f"forecast the disk space of run {run.spec.run_id}"):
            run.warnings["disk"] = await run.on_disk(shortage_after, run.spec, run.manifest.segments)

    async def _drop_old_segments(self, run: LiveRun) -> None:
        """Commit the line that drops media, then remove the files: no reader looks for what is missing."""
        spec, manifest, before = run.spec, run.manifest, run.removed
        after = retention(
            len(manifest.segments),
            spec.config.output.keep_segments,
            run.lookback_latents,
            spec.layout,
            spec.config.cache.reuse_window,
            spec.planned_from,
            self._seen_next(run),
        )
        if after == before:
            return
        if after.media_from > manifest.dropped_before:
            await run.append(Dropped(spec.incarnation, after.media_from))
        media = range(before.media_from, after.media_from)
        gone = [spec.media(index) for index in media]
        gone += [spec.folder.record(index, spec.segment(index).take) for index in media]
        gone += [spec.latents(index) for index in after.latents_since(before)]
        await run.on_disk(spec.folder.remove, gone)
        await run.on_disk(run.manifest.segments.forget_statistics, media.start, media.stop)
        run.removed = after

    def _seen_next(self, run: LiveRun) -> tuple[int, ...]:
        """Segments, however old, whose latents the next one is made from."""
        if run.window is not None:
            return segments_seen(run.spec.storyboard, len(run.manifest.segments), run.window)
        return (0,) if run.spec.config.continuity.adain else ()  # all segments follow the first one's colours

    async def _finalize(self, run: LiveRun, work: Work) -> None:
        await self._clean_up(run)
        stats = await self._ask(run, work, "finalize_run", run.manifest.dropped_before)
        run.final_digest = digests_in(stats)["final"]

    async def stop(self, run: LiveRun, stop: StopWork, machine: SegmentScheduler) -> None:
        """Ask the GPU actor to end the run's work in flight; after `answer_timeout_s`, kill the actor."""
        run_id, engine, loop = stop.run_id, run.spec.config.engine, asyncio.get_running_loop()
        until = loop.time() + engine.answer_timeout_s
        with contextlib.suppress(ConnectionError):  # a dead actor fails the work itself
            await answered(self._pool.denoiser(stop.worker, "stop_run", run_id), engine.answer_timeout_s, "a cancel")
        if not await run.wait(lambda: run.ended or not machine.at_work(run_id), max(0.1, until - loop.time())):
            _log.warning("run %s did not stop within %g s; its GPU actor is killed", run_id, engine.answer_timeout_s)
            await self._pool.restart_denoiser(stop.worker)

    async def close(self, run: LiveRun, close: CloseRun) -> None:
        """End a run that has no work in flight: free what it holds, record its end, release its lock."""
        spec = run.spec
        # Before clients are notified: whoever waits for the end may end the actors, and nothing may be left over then.
        with best_effort(f"free what run {close.run_id} has left in memory and on disk"):
            if close.worker is not None:
                await self.release(spec, close.worker)
        final = spec.folder.relative(spec.folder.final) if close.state == "done" else None
        digest = run.final_digest if final else None
        if failure := await run.record_end(Ended(spec.incarnation, close.state, close.error, final, digest)):
            _log.error("the end of run %s cannot be recorded: %s", close.run_id, failure)
        await run.close()

    async def release(self, spec: RunSpec, worker: int) -> None:
        """Free what the actors hold for a run. If it is resumed, segments with lost residuals are made again.

        Raises NoAnswer if the store is alive and its disk does not answer.
        """
        engine, loop = spec.config.engine, asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):  # a dead actor holds nothing
            released = self._pool.denoiser(worker, "release_run", spec.run_id)
            await answered(released, engine.answer_timeout_s, "the end of a run")
        until = loop.time() + engine.start_timeout_s
        while loop.time() < until:
            try:
                call = self._pool.store(worker, "drop_run", spec.residuals_id, spec.residuals_directory)
                return await self._watchdog.watch_store(worker, call, engine)
            except NoAnswer:
                raise
            except NotStarted:
                return
            except ConnectionError:  # the next store finds on disk what this one has left
                await asyncio.sleep(RELEASE_PAUSE_S)


def digests_in(stats: Mapping[str, float]) -> dict[str, str]:
    """The digests of files among the statistics of a piece of work, as a record holds them."""
    return {name.removesuffix(_DIGEST): f"{int(value):016x}" for name, value in stats.items() if name.endswith(_DIGEST)}


async def explain(error: Exception, run: LiveRun) -> tuple[str, FailureKind]:
    """One sentence for the user, and the kind of failure."""
    cause = getattr(error, "cause", None) or error
    path = run.spec.folder.path
    if not isinstance(error, FolderSilent) and await run.is_gone():
        return f"the run's folder {path} was removed while the run was active", "fatal"
    if is_full(cause):
        return f"no space is left for {path}; free some, then run `edit-ray resume {run.spec.run_id}`", "error"
    sentence = str(cause).strip().splitlines()[0] if str(cause).strip() else "no message"
    if isinstance(cause, NoPlace):
        return sentence, "no place"
    if not isinstance(cause, EditRayError):
        sentence = f"{type(cause).__name__}: {sentence}"
    elif isinstance(cause, HostMemoryShort) or not isinstance(cause, _REPEATABLE):
        return sentence, "fatal"
    return sentence, "death" if isinstance(cause, _DEATHS) else "error"


def _segment(run: LiveRun, work: Work) -> SegmentPlan:
    assert work.segment_index is not None, f"{work.stage} without a segment"
    return run.spec.segment(work.segment_index)
