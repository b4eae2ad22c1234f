"""The GPU actor: denoises and decodes segments. The only process that may hold a CUDA context."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from edit_ray.actors.leases import SegmentLeases, Store
from edit_ray.actors.messages import Progress, RunSpec, code_version, statistics
from edit_ray.cache.stores.planned import PlannedStore
from edit_ray.engine.continuity import match_statistics
from edit_ray.engine.latent_files import latent_tail, load_latents, save_latents
from edit_ray.engine.segment import SegmentEngine, usable_cores
from edit_ray.engine.stream import Preceding
from edit_ray.errors import RunCancelled, SegmentFailed
from edit_ray.runs.event_log import append_event
from edit_ray.runs.folder import publish, write_atomic
from edit_ray.runs.plan import SegmentPlan
from edit_ray.video.encode import encode, join
from edit_ray.video.joins import Joins
from edit_ray.video.stream_files import write_part

T = TypeVar("T")


class DenoiserActor:
    """Carries out one piece of work per call; between calls it only remembers what could be had again.

    Every call names its whole run, so that a restarted actor goes on where the last one died: the model is loaded, the
    prompts are encoded and the decoder's state is rebuilt from committed latents whenever they are not at hand.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._engine: SegmentEngine | None = None
        self._loaded_for: object = None
        self._thread = ThreadPoolExecutor(1, "torch")
        self._stopped: set[str] = set()
        self._progress: Progress | None = None
        self._joins = Joins()
        self._leases: dict[str, SegmentLeases | None] = {}  # by run; None for one that reuses nothing

    def describe(self) -> dict[str, str | int]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"version": code_version(), "pid": os.getpid(), "device": device}

    def progress(self) -> Progress | None:
        return self._progress

    def sees(self, path: Path) -> bool:
        """Whether a file of the caller's is visible on this node."""
        return path.exists()

    def prepare_run(self, spec: RunSpec) -> dict[str, float]:
        """Loads the model if another one is loaded, encodes every prompt of the run, frees the text encoder's place.

        What the run begins from is encoded, and made durable. Raises ConfigError for a file that cannot be used.
        """
        started = time.perf_counter()
        self._stopped.discard(spec.run_id)
        engine, config = self._ready_engine(spec), spec.config
        if config.continuity.init is not None and not spec.folder.init_latents.exists():
            latents, _, _ = self._compute(engine, lambda: engine.encode_init(config.continuity, config.sampling))
            save_latents(spec.folder.init_latents, latents)
        return statistics(prepare_s=time.perf_counter() - started)

    def denoise_segment(self, spec: RunSpec, segment: SegmentPlan, attempt: int) -> dict[str, float]:
        """Denoises one segment and makes its latents durable, and what others reuse of it.

        Raises RunCancelled when the run is stopped meanwhile, SegmentFailed when the latents are not finite, EntryLost
        when what it should reuse is gone.
        """
        engine = self._ready_engine(spec)
        leases = self._leases_of(spec, engine)
        append_event(spec.folder.events, "segment_begun", segment=segment.index, attempt=attempt)
        made_again = 0 if leases is None else self._make_lost_again(spec, engine, leases, segment.index, attempt)
        store = None if leases is None else leases.begin(segment.index, attempt, engine.history_len)
        if store is not None and segment.index + 1 < len(spec.plan.segments):
            append_event(spec.folder.events, "prepare_asked", segment=segment.index + 1)
        latents, denoise_at, denoise_s = self._denoise(spec, engine, segment, store)
        save_latents(spec.folder.latents(segment.index), latents)
        reused = {}
        if leases is not None and store is not None:
            began = time.time()
            reused = _reuse_statistics(store, leases.complete(segment.index, attempt))
            reused |= {"complete_at": began, "complete_s": time.time() - began, "segments_made_again": made_again}
        append_event(spec.folder.events, "segment_made", segment=segment.index, attempt=attempt)
        return statistics(
            denoise_at=denoise_at, denoise_s=denoise_s, **self._cache_statistics(engine, spec, segment), **reused
        )

    def _denoise(
        self, spec: RunSpec, engine: SegmentEngine, segment: SegmentPlan, store: PlannedStore | None
    ) -> tuple[torch.Tensor, float, float]:
        """The latents that a segment adds, when that began, and its seconds."""
        sampling, continuity = spec.config.sampling, spec.config.continuity

        def on_step(step: int, num_steps: int) -> None:
            self._progress = Progress(spec.run_id, segment.index, step, num_steps)
            if spec.run_id in self._stopped:
                raise RunCancelled(f"run {spec.run_id} was stopped")

        def work() -> torch.Tensor:
            latents = engine.denoise(
                sampling,
                prompt=segment.prompt,
                seed=segment.seed,
                **self._context(engine, spec, segment.index),
                on_step=on_step,
                cache=spec.config.cache,
                segment_index=segment.index,
                store=store,
            )
            added = latents[
                :, :, spec.layout.first_latent(segment.index) - spec.layout.first_latent(segment.index + 1) :
            ]
            if segment.index == 0 and continuity.begins_with_picture:
                return torch.cat([load_latents(spec.folder.init_latents)[:, :, :1], added[:, :, 1:]], dim=2)
            if continuity.adain and segment.index:
                return match_statistics(added, load_latents(spec.folder.latents(0)), continuity.adain)
            return added

        return self._compute(engine, work)

    def _make_lost_again(
        self, spec: RunSpec, engine: SegmentEngine, leases: SegmentLeases, segment: int, attempt: int
    ) -> int:
        """Makes earlier segments again for residuals that the store has lost; how many. Their latents stay.

        The same config, seed and hardware give the same bits, which is checked. A segment before which others are lost
        waits for those; that ends at the latest with the first one, which reads nothing.
        """
        lost, again = leases.lost(segment, attempt), max(attempt, 1)
        made = 0
        for index in lost:
            made += 1 + self._make_lost_again(spec, engine, leases, index, again)
            store = leases.begin(index, again, engine.history_len, then_next=False)
            latents, _, _ = self._denoise(spec, engine, spec.plan.segments[index], store)
            if not torch.equal(latents, load_latents(spec.folder.latents(index))):
                leases.give_up()
                raise SegmentFailed(
                    f"segment {index} was made again, as residuals of it were lost, and its latents differ from the "
                    "committed ones"
                )
            leases.complete(index, again)
        if lost:
            leases.follow(segment)
        return made

    def decode_segment(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """Decodes one segment's new latents into its media file."""
        engine = self._ready_engine(spec)
        latents = load_latents(spec.folder.latents(segment.index))
        frames, decode_at, decode_s = self._compute(
            engine,
            lambda: engine.decode(
                spec.run_id if spec.layout.history_latents else None,
                latents,
                position=spec.layout.first_latent(segment.index),
                preceding=self._preceding(spec, segment.index),
                keep_frames=spec.config.continuity.carried_frames,
            ),
        )
        assert len(frames) == segment.num_frames, f"{len(frames)} frames decoded, {segment.num_frames} planned"
        encode_at = time.time()
        media = spec.folder.media(segment.index)
        encoded = encode(frames.numpy(), fps=spec.config.sampling.fps, options=spec.config.output)
        write_part(spec.folder.path, spec.part(segment), segment.index, encoded)
        encode_s = time.time() - encode_at
        times = {"decode_at": decode_at, "decode_s": decode_s, "encode_at": encode_at, "encode_s": encode_s}
        return statistics(media_bytes=media.stat().st_size, **times, **self._seen(spec, segment))

    def finalize_run(self, spec: RunSpec) -> dict[str, float]:
        """Joins the segments into `final.mp4`."""
        started = time.perf_counter()
        draft = spec.folder.final.with_name(".final.mp4.part")
        media = [spec.folder.media(segment.index) for segment in spec.plan.segments]
        join(spec.folder.init, media, draft, comment=spec.settings)
        publish(draft, spec.folder.final)
        return statistics(finalize_s=time.perf_counter() - started)

    def stop_run(self, run_id: str) -> None:
        """What runs for this run ends at its next step."""
        self._stopped.add(run_id)

    def release_run(self, run_id: str) -> None:
        """Frees what is kept for an ended run; the model stays loaded."""
        self._stopped.discard(run_id)
        self._joins.forget(run_id)
        leases = self._leases.pop(run_id, None)
        if leases is not None:
            leases.close()
        if self._engine is not None:
            self._engine.release(run_id)
        self._progress = None

    def _seen(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """What the written segment looks like, and how it joins its predecessor."""
        before = spec.part(spec.plan.segments[segment.index - 1]) if segment.index else None
        size = {"height": spec.config.sampling.height, "width": spec.config.sampling.width}
        return self._joins.measure(spec.run_id, spec.folder.path, spec.part(segment), before, **size)

    def _ready_engine(self, spec: RunSpec) -> SegmentEngine:
        """The engine of this run's model, with this run's prompts encoded."""
        return self._thread.submit(self._load_for, spec).result()

    def _load_for(self, spec: RunSpec) -> SegmentEngine:
        config = spec.config
        threads = config.engine.cpu_threads or usable_cores()  # Ray would leave one
        if self._engine is None or self._loaded_for != config.model:
            self._engine = None  # the last model goes before the next one comes
            self._engine, self._loaded_for = SegmentEngine.load(config.model, threads), config.model
        torch.set_num_threads(threads)
        self._engine.encode_prompts(config.prompts, config.sampling.negative_prompt)
        return self._engine

    def _compute(self, engine: SegmentEngine, work: Callable[[], T]) -> tuple[T, float, float]:
        """What the work gives, when it began (in unix seconds), and its seconds.

        On a CPU one thread does all of torch's work. OpenMP keeps a team of threads for each thread that calls it, and
        as soon as two teams are more threads than cores, both wait asleep instead of spinning: half the speed.
        """

        def timed() -> tuple[T, float, float]:
            began, started = time.time(), time.perf_counter()
            return work(), began, time.perf_counter() - started

        return self._thread.submit(timed).result() if engine.device.type == "cpu" else timed()

    def _leases_of(self, spec: RunSpec, engine: SegmentEngine) -> SegmentLeases | None:
        if spec.run_id not in self._leases:
            config = spec.config
            reuse = self._thread.submit(
                engine.plan_reuse,
                spec.run_id,
                len(spec.plan.segments),
                config.cache,
                config.sampling,
                config.store.disk_bytes,
            ).result()
            self._leases[spec.run_id] = None if reuse is None else SegmentLeases(self._store, spec, reuse)
        return self._leases[spec.run_id]

    def _cache_statistics(self, engine: SegmentEngine, spec: RunSpec, segment: SegmentPlan) -> dict[str, int]:
        """What the cache computed and skipped in the segment; its decisions go into the run's folder."""
        record = engine.record
        if record is None:
            return {}
        write_atomic(spec.folder.record(segment.index), record.to_json().encode())
        skipped = sum(decision.decision == "reuse" for decision in record)
        return {"units_computed": len(record) - skipped, "units_skipped": skipped}

    def _context(self, engine: SegmentEngine, spec: RunSpec, segment_index: int) -> dict[str, torch.Tensor]:
        """What a segment continues: made of committed latents alone, whatever this actor has seen of the run."""
        if segment_index == 0:
            continuity = spec.config.continuity
            if continuity.init is None:
                return {}
            return {continuity.mode: load_latents(spec.folder.init_latents)[:, :, -continuity.init_latents :]}
        position, preceding = spec.layout.first_latent(segment_index), self._preceding(spec, segment_index)
        return engine.context(spec.config.continuity, spec.run_id, position=position, preceding=preceding)

    def _preceding(self, spec: RunSpec, segment_index: int) -> Preceding:
        """Reads the last latents of the stream before a segment."""
        before = [spec.folder.latents(k) for k in range(segment_index)]
        if spec.layout.init_latents:
            before.insert(0, spec.folder.init_latents)
        return lambda count: latent_tail(before, count)


def _reuse_statistics(store: PlannedStore, tiers: dict[str, Any]) -> dict[str, float]:
    """What the segment reused, what it waited for, and what the tiers hold after it."""
    prefetch = tiers["counters"].prefetch
    return {
        "entries_read": store.waits.reads,
        "entries_written": store.waits.writes,
        "reuse_wait_s": store.waits.seconds,
        "host_bytes": tiers["bytes"]["host"],
        "disk_bytes": tiers["on_disk_bytes"],
        "stale_leases": tiers["stale_leases"],
        **{
            f"prefetch_{outcome}": getattr(prefetch, outcome)
            for outcome in ("requested", "useful", "late", "wasted", "unfulfilled", "cancelled")
        },
    }
