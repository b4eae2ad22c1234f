"""How each piece of work is carried out: by which call to which actor, and what becomes durable by it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from edit_ray import files
from edit_ray.actors.best_effort import best_effort
from edit_ray.actors.hardware import check_same, differing
from edit_ray.actors.live_run import FolderSilent, LiveRun
from edit_ray.actors.messages import RunSpec, statistics
from edit_ray.actors.pool import ActorGone, ActorPool
from edit_ray.actors.space import is_full, shortage_after
from edit_ray.actors.watchdog import Watchdog, answered
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
from edit_ray.runs.events import FailureKind, Work
from edit_ray.runs.manifest import Committed, Dropped, HardwareChanged, SegmentRecord, Tiled
from edit_ray.runs.plan import SegmentPlan
from edit_ray.runs.retention import retention
from edit_ray.video.encode import EncoderKilled
from edit_ray.video.stream_files import Part

T = TypeVar("T")
_log = logging.getLogger(__name__)
_DIGEST = "_xxh3"  # ends the names of figures that are digests of files

# Errors of ours that another attempt may not meet again.
_REPEATABLE = (SegmentFailed, RunCancelled, EntryLost, StaleLease, StaleWork, NotAdopted, ResourcesUnavailable)

# What comes of the death of an actor, or of the encoder.
_DEATHS = (ActorGone, StoreDied, StaleLease, NotAdopted, EncoderKilled)

RETRY_PAUSE_S, LONGEST_RETRY_PAUSE_S = 1.0, 30.0  # the first pause, and what doubling it leads to


def pause_before(attempt: int) -> float:
    """Seconds to wait before a piece of work is tried again (attempt 1 is the first repetition).

    What made it fail may take a while to end: actors outlive the node that died under them, by up to a second or two,
    and answer meanwhile.
    """
    return min(RETRY_PAUSE_S * 2.0 ** min(attempt - 1, 10), LONGEST_RETRY_PAUSE_S) if attempt else 0.0


class Stages:
    """Carries out the instructions of the state machine, one call of `carry_out` for each."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self.watchdog = Watchdog(pool)

    async def carry_out(self, run: LiveRun, work: Work) -> None:
        """Returns when the work is done, raises whatever makes it fail."""
        await asyncio.sleep(pause_before(work.attempt))
        if work.attempt:
            await run.on_disk(lambda: None)  # what failed may have been a folder that did not answer, and go on there
        if work.attempt or work.stage == "prepare":
            await self._begin(run, work)  # what failed may have been an actor's death
        stages: dict[str, Callable[[LiveRun, Work], Awaitable[None]]] = {
            "prepare": self._prepare,
            "denoise": self._denoise,
            "decode": self._decode,
            "encode": self._encode,
            "commit": self._commit,
            "finalize": self._finalize,
        }
        try:
            await stages[work.stage](run, work)
        except NotAdopted:  # its actor was started again while nothing was asked of it
            await self._begin(run, work)
            await stages[work.stage](run, work)

    async def _begin(self, run: LiveRun, work: Work) -> None:
        """The run's actors are there, on the hardware that its manifest names, and know the run.

        Raises HardwareDiffers where something was made on other hardware, unless the run may move.
        """
        await self._pool.start(run.spec, work.worker)
        async with run.beginning:
            engine = run.spec.config.engine
            asked = self._pool.denoiser(work.worker, "provenance", run.spec)
            here = await answered(asked, engine.load_timeout_s, "what the GPU actor runs on")
            made = max(run.statistics, default=len(run.manifest.segments) - 1) + 1  # segments that have latents
            if made and not run.may_move:
                check_same(run.spec.run_id, run.manifest.provenance, here)
            if differing(run.manifest.provenance, here):
                await run.append(HardwareChanged(run.spec.incarnation, here, made))
                run.spec = RunSpec.of(run.spec.root, run.spec.config, run.manifest)
            adopted = self._pool.denoiser(work.worker, "adopt_run", run.spec)
            await answered(adopted, engine.answer_timeout_s, "the adoption of the run")

    async def _prepare(self, run: LiveRun, work: Work) -> None:
        said = await self._watched(run, work, self._pool.denoiser(work.worker, "prepare_run", run.spec))
        run.lookback_latents = int(said["lookback_latents"])
        await self._remake_damaged(run, work)
        first = run.manifest.dropped_before
        parts = [Part(at.media, at.first_frame, at.num_frames) for at in run.manifest.segments[first:]]
        await run.on_disk(partial(run.stream.rebuild, anew=run.remakes), parts, first)

    async def _remake_damaged(self, run: LiveRun, work: Work) -> None:
        """Makes damaged files of committed segments again, whose bytes must be those that were committed.

        Raises RunDamaged where they are not, or the latents were made with residuals of others.
        """
        spec = run.spec
        if spec.folder.init in run.damaged:
            await run.on_disk(files.remove, spec.folder.init)  # the segment that needs it writes it
        for index in sorted({index for index, _ in run.damaged.values()}):
            segment, record = spec.segment(index), run.manifest.segments[index]
            figures: dict[str, float] = {}
            again = f"`edit-ray reroll {spec.run_id} --from {index}` makes it and what follows anew"
            if spec.latents(index) in run.damaged:
                if spec.config.cache.reuse_window:
                    raise RunDamaged(f"{record.latents} depends on residuals of other segments; {again}")
                call = self._pool.denoiser(work.worker, "denoise_segment", spec, segment, work.attempt)
                figures |= await self._watched(run, work, call)
            if {spec.media(index), spec.folder.init} & run.damaged.keys():
                call = self._pool.denoiser(work.worker, "encode_segment", spec, segment)
                figures |= await self._watched(run, work, call)
            made = digests_in(figures)
            if differing := [name for name in made if made[name] != record.digests.get(name, made[name])]:
                raise RunDamaged(f"segment {index} was made again, and has other {' and '.join(differing)}; {again}")
        run.damaged = {}

    async def _denoise(self, run: LiveRun, work: Work) -> None:
        segment = _segment(run, work)
        call = self._pool.denoiser(work.worker, "denoise_segment", run.spec, segment, work.attempt)
        run.statistics[segment.index] = await self._watched(run, work, call)

    async def _decode(self, run: LiveRun, work: Work) -> None:
        """Once more in tiles where the GPU's memory does not do. Before any frame is made so, that is durable."""
        try:
            figures = await self._decode_once(run, work)
        except OutOfMemory:
            segment_index, spec = _segment(run, work).index, run.spec
            if not spec.may_be_tiled(segment_index):
                raise
            _log.warning("run %s is decoded in tiles from segment %d on", spec.run_id, segment_index)
            await run.append(Tiled(spec.incarnation, segment_index))
            run.spec = replace(spec, tiled_from=segment_index)
            figures = await self._decode_once(run, work)
        self._note(run, work, figures)

    async def _decode_once(self, run: LiveRun, work: Work) -> dict[str, float]:
        call = self._pool.denoiser(work.worker, "decode_segment", run.spec, _segment(run, work))
        return await self._watched(run, work, call)

    async def _encode(self, run: LiveRun, work: Work) -> None:
        call = self._pool.denoiser(work.worker, "encode_segment", run.spec, _segment(run, work))
        self._note(run, work, await self._watched(run, work, call))

    async def _watched(self, run: LiveRun, work: Work, call: Awaitable[T]) -> T:
        return await self.watchdog.watch(work.worker, call, run.spec.config.engine)

    def _note(self, run: LiveRun, work: Work, figures: dict[str, float]) -> None:
        assert work.segment_index is not None
        run.statistics[work.segment_index] = run.statistics.get(work.segment_index, {}) | figures

    async def _commit(self, run: LiveRun, work: Work) -> None:
        """Latents and media are durable already: now what plays, then the manifest's line, which ends the commit."""
        segment = _segment(run, work)
        if segment.index == len(run.manifest.segments):  # else it is the repetition of a commit whose line is there
            await self._append(run, segment)
        run.statistics.pop(segment.index, None)
        await self._clean_up(run)

    async def _append(self, run: LiveRun, segment: SegmentPlan) -> None:
        spec, publish_at, began = run.spec, time.time(), time.perf_counter()
        await run.on_disk(run.stream.append, spec.part(segment))
        published = statistics(publish_at=publish_at, publish_s=time.perf_counter() - began)
        figures = run.statistics.get(segment.index, {})
        record = SegmentRecord(
            index=segment.index,
            take=segment.take,
            prompt=segment.prompt,
            seed=segment.seed,
            first_frame=segment.first_frame,
            num_frames=segment.num_frames,
            latents=spec.folder.relative(spec.latents(segment.index)),
            media=spec.folder.relative(spec.media(segment.index)),
            statistics={name: of for name, of in figures.items() if not name.endswith(_DIGEST)} | published,
            digests=digests_in(figures),
        )
        await run.append(Committed(spec.incarnation, record))

    async def _clean_up(self, run: LiveRun) -> None:
        """Makes room, and looks how much there is. What fails here is done after the next commit."""
        with best_effort(f"drop old segments of run {run.spec.run_id}"):
            await self._drop_old_segments(run)
        with best_effort(f"foresee the disk space of run {run.spec.run_id}"):
            run.warnings["disk"] = await run.on_disk(shortage_after, run.spec, run.manifest.segments)

    async def _drop_old_segments(self, run: LiveRun) -> None:
        """Says first that they are gone, then removes them: nobody looks for what is not there."""
        spec, manifest, before = run.spec, run.manifest, run.removed
        after = retention(
            len(manifest.segments),
            spec.config.output.keep_segments,
            run.lookback_latents,
            spec.layout,
            spec.config.cache.reuse_window,
            spec.planned_from,
        )
        if after == before:
            return
        if after.media_from > manifest.dropped_before:
            await run.append(Dropped(spec.incarnation, after.media_from))
        first = 1 if spec.config.continuity.adain else 0  # the colours of every segment follow the first's
        media = range(before.media_from, after.media_from)
        gone = [spec.media(index) for index in media]
        gone += [spec.folder.record(index, spec.segment(index).take) for index in media]
        gone += [spec.latents(index) for index in range(max(first, before.latents_from), after.latents_from)]
        await run.on_disk(spec.folder.remove, gone)
        await run.forget_figures(media.start, media.stop)
        run.removed = after

    async def _finalize(self, run: LiveRun, work: Work) -> None:
        await self._clean_up(run)
        call = self._pool.denoiser(work.worker, "finalize_run", run.spec, run.manifest.dropped_before)
        figures = await self._watched(run, work, call)
        run.final_digest = digests_in(figures)["final"]


def digests_in(figures: Mapping[str, float]) -> dict[str, str]:
    """The digests of files among the figures of a piece of work, as a record holds them."""
    return {
        name.removesuffix(_DIGEST): f"{int(value):016x}" for name, value in figures.items() if name.endswith(_DIGEST)
    }


async def explain(error: Exception, run: LiveRun) -> tuple[str, FailureKind]:
    """One sentence for the user, and what kind of failure it is."""
    cause = getattr(error, "cause", None) or error
    path = run.spec.folder.path
    if not isinstance(error, FolderSilent) and await run.is_gone():
        return f"the run's folder {path} was removed while the run was at work", "fatal"
    if is_full(cause):
        return f"no space is left for {path}; free some, then go on with `edit-ray resume {run.spec.run_id}`", "error"
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
