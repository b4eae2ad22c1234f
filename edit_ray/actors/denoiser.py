"""The GPU actor: denoises and decodes segments. The only process that may hold a CUDA context."""

from __future__ import annotations

import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from edit_ray.actors.adoption import Adoption
from edit_ray.actors.continuing import added_by, context_of, preceding_of, tiled_position
from edit_ray.actors.messages import Progress, RunSpec, code_version, statistics
from edit_ray.actors.stats import StepTimes, cache_statistics, show_memory
from edit_ray.actors.threads import OneThread
from edit_ray.engine.latent_files import load_latents, save_latents
from edit_ray.engine.loading import choose_device
from edit_ray.engine.lookback import lookback_latents
from edit_ray.engine.model_digest import model_digest
from edit_ray.engine.provenance import provenance_of
from edit_ray.engine.segment import KEPT_PROMPTS, SegmentEngine, usable_cores
from edit_ray.errors import EditRayError, OutOfMemory, SegmentFailed
from edit_ray.files import digest_of_file, read_bytes, replacing
from edit_ray.metrics.collect import MetricValues, Snapshot
from edit_ray.runs.event_log import append_event
from edit_ray.runs.plan import SegmentPlan
from edit_ray.tiers.leases import SegmentLeases, Store, reuse_statistics
from edit_ray.tiers.store_client import PlannedStore
from edit_ray.video.encode import Frames, Patience, encode, ffmpeg_version, join
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
        self._weights: str | None = None  # the digest of what was loaded
        self._threads = 0  # of torch
        self._thread = OneThread("torch")
        self._decoding = threading.Lock()
        self._adoption = Adoption()
        self._progress: Progress | None = None
        self._joins = Joins()
        self._values, self._life = MetricValues(), secrets.token_hex(8)
        self._beat, self._loading = 0, False
        self._short_of_memory = False  # whether the work before this has run out of it
        self._leases: dict[str, tuple[object, SegmentLeases | None]] = {}  # by run, with what they are for
        self._frames: dict[tuple[str, Path, int], Frames] = {}  # decoded, and not encoded yet

    def describe(self) -> dict[str, str | int]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"version": code_version(), "pid": os.getpid(), "device": device, "gpus": torch.cuda.device_count()}

    def provenance(self, spec: RunSpec) -> dict[str, str | int]:
        """What the run's bits would depend on here, beside its configuration. Raises ModelError."""
        engine = spec.config.engine
        threads = engine.cpu_threads or usable_cores()
        here = provenance_of(choose_device(spec.config.model.device), threads, engine.mode, engine.fp8)
        model = model_digest(spec.config.model.path)
        return here | {"ffmpeg": ffmpeg_version()} | ({} if model is None else {"model": model})

    def progress(self) -> Progress | None:
        return self._progress

    def metrics(self) -> Snapshot:
        """What this actor has counted, and what it holds of the device's memory."""
        if self._engine is not None:
            show_memory(self._values, self._engine.device)
        return self._values.snapshot(self._life)

    def beat(self) -> int | None:
        """Another number after each step and each piece of work; None while a model is loaded."""
        return None if self._loading else self._beat

    def sees(self, path: Path) -> bool:
        """Whether a file of the caller's is visible on this node."""
        return path.exists()

    def adopt_run(self, spec: RunSpec) -> None:
        """From now on the run is worked on for this incarnation; what is at work for an earlier one ends soon.

        What is kept for another run of the same id, whose folder was removed, is freed.
        """
        known = self._adoption.of(spec.run_id)
        if known is not None and known.key != spec.key:
            self.release_run(spec.run_id)
        self._adoption.adopt(spec)

    def prepare_run(self, spec: RunSpec) -> dict[str, int]:
        """Loads the model if another one is loaded, encodes the run's prompts, frees the text encoder's place.

        What the run begins from is encoded, and made durable. Returns how many latents before a segment it and its
        decoding may need. Raises ConfigError for a file that cannot be used.
        """
        self.adopt_run(spec)
        if self._weights != model_digest(spec.config.model.path):
            self._loaded_for = None  # other weights lie at the path than those that are loaded
        engine, config = self._ready_engine(spec), spec.config
        if config.continuity.init is not None and not spec.folder.init_latents.exists():
            latents, _, _ = self._compute(engine, lambda: engine.encode_init(config.continuity, config.sampling))
            save_latents(spec.folder.init_latents, latents)
        lookback = lookback_latents(engine.pipe.vae.config) if spec.layout.history_latents else 0
        return {"lookback_latents": lookback + spec.layout.history_latents}

    def denoise_segment(self, spec: RunSpec, segment: SegmentPlan, attempt: int) -> dict[str, float]:
        """Denoises one segment and makes its latents durable, and what others reuse of it.

        Raises RunCancelled when the run is stopped meanwhile, StaleWork when another incarnation has it, SegmentFailed
        when the latents are not finite, EntryLost when what it should reuse is gone, OutOfMemory.
        """
        self._adoption.check(spec)
        engine = self._ready_engine(spec, segment.index)
        leases = self._leases_of(spec, engine)
        append_event(spec.folder.events, "segment_begun", segment=segment.index, attempt=attempt)
        reusing = segment.index - spec.planned_from  # its number among those that reuse each other's residuals
        made_again = 0 if leases is None else self._make_lost_again(spec, engine, leases, reusing, attempt)
        store = None if leases is None else leases.begin(reusing, attempt, engine.history_len)
        if store is not None and segment.index + 1 < (spec.num_segments or 0):
            append_event(spec.folder.events, "prepare_asked", segment=segment.index + 1)
        latents, denoise_at, denoise_s = self._denoise(spec, engine, segment, store)
        digest = save_latents(spec.latents(segment.index), latents)
        reused = {}
        if leases is not None and store is not None:
            complete_at, began = time.time(), time.perf_counter()
            reused = reuse_statistics(store, leases.complete(reusing, attempt))
            complete_s = time.perf_counter() - began
            reused |= {"complete_at": complete_at, "complete_s": complete_s, "segments_made_again": made_again}
        self._short_of_memory = False
        figures = statistics(
            denoise_at=denoise_at, denoise_s=denoise_s, **cache_statistics(engine.record, spec, segment), **reused
        )
        figures |= {"latents_xxh3": digest}
        of = {"segment": segment.index, "take": segment.take, "attempt": attempt}
        append_event(spec.folder.events, "segment_made", **of, plan=spec.residuals_id, figures=figures)
        return figures

    def _denoise(
        self, spec: RunSpec, engine: SegmentEngine, segment: SegmentPlan, store: PlannedStore | None
    ) -> tuple[torch.Tensor, float, float]:
        """The latents that a segment adds, when that began, and its seconds."""
        sampling = spec.config.sampling.model_copy(
            update={"negative_prompt": segment.negative_prompt, "guidance_scale": segment.guidance_scale}
        )

        times = StepTimes(self._values)

        def on_step(step: int, num_steps: int) -> None:
            times.step(engine.record)
            self._progress = Progress(spec.run_id, segment.index, step, num_steps)
            self._beat += 1
            self._adoption.check(spec)
            self._let_decoding_go_first(engine)

        def work() -> torch.Tensor:
            times.begin()
            latents = engine.denoise(
                sampling,
                prompt=segment.prompt,
                seed=segment.seed,
                **context_of(engine, spec, segment.index),
                on_step=on_step,
                cache=spec.config.cache,
                segment_index=segment.index - spec.planned_from,
                store=store,
            )
            return added_by(latents, spec, segment.index)

        self._let_decoding_go_first(engine)
        return self._compute(engine, work, denoises=True)

    def _let_decoding_go_first(self, engine: SegmentEngine) -> None:
        """A step begins when no decoding is at work: at once they take as long as one by one, and frames come later."""
        if engine.device.type == "cuda":
            with self._decoding:
                return
        self._thread.give_way()

    def _make_lost_again(
        self, spec: RunSpec, engine: SegmentEngine, leases: SegmentLeases, reusing: int, attempt: int
    ) -> int:
        """Makes earlier segments again for residuals that the store has lost; how many. Their latents stay.

        The same config, seed and hardware give the same bits, which is checked. A segment before which others are lost
        waits for those; that ends at the latest with the first one, which reads nothing.
        """
        lost, again = leases.lost(reusing, attempt), max(attempt, 1)
        made = 0
        for index in lost:
            made += 1 + self._make_lost_again(spec, engine, leases, index, again)
            store = leases.begin(index, again, engine.history_len, then_next=False)
            segment = spec.segment(spec.planned_from + index)
            latents, _, _ = self._denoise(spec, engine, segment, store)
            if not torch.equal(latents, load_latents(spec.latents(segment.index))):
                leases.give_up()
                raise SegmentFailed(
                    f"segment {segment.index} was made again, as residuals of it were lost, and its latents differ "
                    "from the committed ones"
                )
            leases.complete(index, again)
        if lost:
            leases.follow(reusing)
        return made

    def decode_segment(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """Decodes one segment's new latents; the frames wait here to be encoded. Raises OutOfMemory at once."""
        self._adoption.check(spec)
        frames, decode_at, decode_s = self._decode(spec, segment, again=False)
        self._frames[spec.key, spec.media(segment.index), spec.incarnation] = frames
        return statistics(decode_at=decode_at, decode_s=decode_s, decode_tiled=spec.tiled(segment.index))

    def encode_segment(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """Encodes one segment's frames into its media file; where they are not at hand they are decoded again."""
        self._adoption.check(spec)
        media = spec.media(segment.index)
        frames = self._frames.get((spec.key, media, spec.incarnation))
        if frames is None:
            frames, _, _ = self._decode(spec, segment)
        encode_at, began = time.time(), time.perf_counter()
        there = read_bytes(spec.folder.init) if spec.folder.init.exists() else None
        fps, options, patience = spec.config.sampling.fps, spec.config.output, self._patience(spec)
        encoded = encode(frames, fps=fps, options=options, init=there, patience=patience)
        init, fragment = write_part(spec.folder.path, spec.part(segment), segment.index, encoded)
        self._frames.pop((spec.key, media, spec.incarnation), None)
        times = {"encode_at": encode_at, "encode_s": time.perf_counter() - began}
        digests = {"init_xxh3": init, "media_xxh3": fragment}
        return statistics(media_bytes=media.stat().st_size, **times, **self._seen(spec, segment)) | digests

    def finalize_run(self, spec: RunSpec, first: int) -> dict[str, float]:
        """Joins the segments from `first` on, those before being dropped, into `final.mp4`."""
        self._adoption.check(spec)
        assert spec.num_segments is not None, "a run without an end has no final video"
        started = time.perf_counter()
        media = [spec.media(index) for index in range(first, spec.num_segments)]
        with replacing(spec.folder.final) as draft:
            join(spec.folder.init, media, draft.path, comment=spec.settings, patience=self._patience(spec))
            digest = digest_of_file(draft.path, self._work_on)
        return statistics(finalize_s=time.perf_counter() - started) | {"final_xxh3": digest}

    def _patience(self, spec: RunSpec) -> Patience:
        """Half of a step's time: an encoder that hangs ends before the watchdog finds that this actor hangs."""
        return Patience(spec.config.engine.step_timeout_s / 2, self._work_on)

    def _work_on(self) -> None:
        self._beat += 1

    def stop_run(self, run_id: str) -> None:
        """What runs for this run ends at its next step."""
        self._adoption.stop(run_id)

    def release_run(self, run_id: str) -> None:
        """Frees what is kept for an ended run; the model stays loaded."""
        spec = self._adoption.of(run_id)
        self._adoption.forget(run_id)
        self._progress = None
        if spec is None:
            return
        self._joins.forget(spec.key)
        _, leases = self._leases.pop(spec.key, (None, None))
        if leases is not None:
            leases.close()
        if self._engine is not None:
            self._engine.release(spec.key)
        for decoded in [decoded for decoded in self._frames if decoded[0] == spec.key]:
            del self._frames[decoded]

    def _seen(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """What the written segment looks like, and how it joins its predecessor."""
        before = spec.part(spec.segment(segment.index - 1)) if segment.index else None
        if before is not None and not (spec.folder.path / before.path).exists():
            before = None  # dropped to make room, before the run was re-rolled from here
        size = {"height": spec.config.sampling.height, "width": spec.config.sampling.width}
        patience = self._patience(spec)
        return self._joins.measure(spec.key, spec.folder.path, spec.part(segment), before, **size, patience=patience)

    def _ready_engine(self, spec: RunSpec, index: int = 0) -> SegmentEngine:
        """The engine of this run's model, with the prompts encoded of this run, or of the segments around this one."""
        self._beat += 1
        return self._thread.submit_first(lambda: self._load_for(spec, index)).result()

    def _load_for(self, spec: RunSpec, index: int) -> SegmentEngine:
        config = spec.config
        threads = config.engine.cpu_threads or usable_cores()  # Ray would leave one
        wanted = config.model, config.engine.cfg_parallel
        if self._engine is None or self._loaded_for != wanted:
            self._engine, self._loading = None, True  # the last model goes before the next one comes
            try:
                weights = model_digest(config.model.path)
                engine = SegmentEngine.load(config.model, threads, cfg_parallel=config.engine.cfg_parallel)
                self._engine, self._loaded_for, self._weights = engine, wanted, weights
            finally:
                self._loading = False
        torch.set_num_threads(threads)
        self._threads = threads
        self._engine.max_live_decoders = config.engine.max_live_decoders
        self._engine.use_mode(config.engine.mode, fp8=config.engine.fp8)
        self._loading = True  # hundreds of prompts take as long as a model
        try:
            self._engine.encode_prompts(spec.texts(index, KEPT_PROMPTS))
        finally:
            self._loading = False
        return self._engine

    def _decode(self, spec: RunSpec, segment: SegmentPlan, *, again: bool = True) -> tuple[Frames, float, float]:
        """The segment's frames, uint8 [F, H, W, 3], when their decoding began, and its seconds."""

        def work() -> torch.Tensor:
            return engine.decode(
                spec.key if spec.layout.history_latents else None,
                latents,
                position=spec.layout.first_latent(segment.index),
                preceding=preceding_of(spec, segment.index),
                keep_frames=spec.config.continuity.carried_frames,
                tiled_from=tiled_position(spec),
            )

        with self._decoding:  # from the call on: the next segment's denoising is asked for at the same moment
            engine = self._ready_engine(spec, segment.index)
            latents = load_latents(spec.latents(segment.index))
            frames, decode_at, decode_s = self._compute(engine, work, again=again)
        assert len(frames) == segment.num_frames, f"{len(frames)} frames decoded, {segment.num_frames} planned"
        return frames.numpy(), decode_at, decode_s

    def _compute(
        self, engine: SegmentEngine, work: Callable[[], T], *, denoises: bool = False, again: bool = True
    ) -> tuple[T, float, float]:
        """What the work gives, when it began (in unix seconds), and its seconds.

        On a CPU one thread does all of torch's work, unless torch has one thread only. OpenMP keeps a team of threads
        for each thread that calls it, and as soon as two teams are more threads than cores, both wait asleep instead of
        spinning: half the speed.

        Where the GPU's memory does not do, what can be had again leaves it; `again` says whether the same may do then.
        """

        def timed() -> tuple[T, float, float]:
            torch.set_num_threads(self._threads)  # of this thread, if it has called torch before
            began, started = time.time(), time.perf_counter()
            return work(), began, time.perf_counter() - started

        one_by_one = engine.device.type == "cpu" and self._threads > 1
        try:
            submit = self._thread.submit if denoises else self._thread.submit_first
            return submit(timed).result() if one_by_one else timed()
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the work had reached
            for _, leases in list(self._leases.values()):
                if denoises and leases is not None:
                    leases.free_device()
            engine.make_room(of_cache=denoises)
            raise self._out_of_memory(error, again) from None

    def _out_of_memory(self, error: torch.OutOfMemoryError, again: bool) -> EditRayError:
        """The first time another attempt may do, the second time none will."""
        if self._short_of_memory or not again:
            return OutOfMemory(
                f"the GPU's memory does not do ({str(error).splitlines()[0]}); lower sampling.height, width or "
                "num_frames, or take a smaller torch_dtype"
            )
        self._short_of_memory = True
        return SegmentFailed("the GPU's memory did not do; what can be had again has left it")

    def _leases_of(self, spec: RunSpec, engine: SegmentEngine) -> SegmentLeases | None:
        """The run's leases; those of an earlier incarnation are given up, and the store is told of the run anew."""
        wanted = spec.incarnation, spec.replanned
        known, leases = self._leases.get(spec.key, (None, None))
        if known == wanted:
            return leases
        if leases is not None:
            leases.close()
        leases = self._plan_leases(spec, engine) if spec.config.cache.reuse_window else None
        self._leases[spec.key] = (wanted, leases)
        return leases

    def _plan_leases(self, spec: RunSpec, engine: SegmentEngine) -> SegmentLeases | None:
        assert spec.num_segments is not None, "what segments reuse is planned for all of them"
        planned = self._thread.submit(
            engine.plan_reuse,
            spec.residuals_id,
            spec.num_segments - spec.planned_from,
            spec.config.cache,
            spec.config.sampling,
            spec.config.store.disk_bytes,
        ).result()
        return None if planned is None else SegmentLeases(self._store, spec.reusing, planned)
