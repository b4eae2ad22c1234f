"""The GPU actor: denoises and decodes segments. The only process that may hold a CUDA context."""

from __future__ import annotations

import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from edit_ray.actors.gpu_work import (
    AdoptedRuns,
    LoadedModel,
    StepTimes,
    added_by,
    cache_stats,
    conditions_of,
    preceding_of,
    reuse_of,
    show_memory,
    tiled_position,
    window_of,
)
from edit_ray.actors.messages import Progress, RunSpec, code_version, rounded
from edit_ray.config.scenes import picture_files
from edit_ray.engine.continuity import load_latents, save_latents
from edit_ray.engine.init_file import pictures_digest
from edit_ray.engine.loading import choose_device, provenance_of, usable_cores
from edit_ray.engine.lora_files import weights_digest
from edit_ray.engine.model_info import lookback_latents
from edit_ray.engine.segment import SegmentEngine
from edit_ray.errors import EditRayError, OutOfMemory, SegmentFailed, StoreDied
from edit_ray.files import digest_of_file, read_bytes, replacing
from edit_ray.metrics.collect import MetricValues, Snapshot
from edit_ray.runs.event_log import append_event
from edit_ray.runs.run_plan import SegmentPlan
from edit_ray.tiers.leases import SegmentLeases, Store, reuse_statistics
from edit_ray.tiers.store_client import PlannedStore
from edit_ray.video.encode import Frames, Patience, encode, ffmpeg_version, join
from edit_ray.video.fragments import write_part
from edit_ray.video.seams import Joins

T = TypeVar("T")


class DenoiserActor:
    """Carries out one piece of work per call. Between calls it holds only state that can be rebuilt.

    Every call names its whole run, so a restarted actor continues where the last one died: it loads the model, encodes
    the prompts and rebuilds the decoder's state from committed latents when it does not have them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._model = LoadedModel()
        self._decoding = threading.Lock()
        self._adopted = AdoptedRuns()
        self._progress: Progress | None = None
        self._joins = Joins()
        self._values, self._life = MetricValues(), secrets.token_hex(8)
        self._beats = 0
        self._short_of_memory = False  # whether the last work ran out of it
        self._leases: dict[str, tuple[object, SegmentLeases | None]] = {}  # by run, with the plan that they are for
        self._frames: dict[tuple[str, Path, int], Frames] = {}  # decoded, and not encoded yet

    def describe(self) -> dict[str, str | int]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"version": code_version(), "pid": os.getpid(), "device": device, "gpus": torch.cuda.device_count()}

    def provenance(self, spec: RunSpec) -> dict[str, str | int]:
        """What the run's bits would depend on here, besides its configuration. Raises ModelError, ConfigError."""
        engine = spec.config.engine
        threads = engine.cpu_threads or usable_cores()
        here = provenance_of(choose_device(spec.config.model.device), threads, engine.mode, engine.fp8)
        model, loras = weights_digest(spec.config.model)
        shown = picture_files(spec.config)
        files = {"model": model, "loras": loras, "pictures": pictures_digest(shown) if shown else None}
        return here | {"ffmpeg": ffmpeg_version()} | {name: digest for name, digest in files.items() if digest}

    def progress(self) -> Progress | None:
        return self._progress

    def metrics(self) -> Snapshot:
        """The counters of this actor, and the device memory that it holds."""
        if self._model.engine is not None:
            show_memory(self._values, self._model.engine.device)
        return self._values.snapshot(self._life)

    def beat(self) -> int | None:
        """Another number after each step and each piece of work; None while a model is loaded."""
        return None if self._model.loading else self._beats

    def sees(self, path: Path) -> bool:
        """Whether a file of the caller's is visible on this node."""
        return path.exists()

    def adopt_run(self, spec: RunSpec) -> None:
        """Work for this incarnation of the run from now on; work in flight for an earlier one ends soon.

        What is kept for another run of the same id, whose folder was removed, is freed.
        """
        if replaced := self._adopted.adopt(spec):
            self._free(replaced)

    def prepare_run(self, spec: RunSpec) -> dict[str, int]:
        """Load the model if another one is loaded, encode all prompts of the run, free the text encoder's memory.

        Encodes what the run begins from and makes it durable. Returns how many latents before a segment it and its
        decoding may need, and the sizes of a causal model's window. Raises ConfigError for a file that cannot be used.
        """
        self.adopt_run(spec)
        self._model.forget_replaced(spec)
        engine, config = self._ready_engine(spec), spec.config
        if config.continuity.init_latents and not spec.folder.init_latents.exists():
            latents, _, _ = self._compute(engine, lambda: engine.encode_init(config.continuity, config.sampling))
            save_latents(spec.folder.init_latents, latents)
        lookback = lookback_latents(engine.pipe.vae.config) if spec.layout.one_stream else 0
        window = window_of(engine, spec)
        needed = {"lookback_latents": lookback + spec.layout.history_latents}
        return needed | (asdict(window) if window is not None else {})

    def denoise_segment(self, spec: RunSpec, segment: SegmentPlan, attempt: int) -> dict[str, float]:
        """Denoise one segment; make its latents and the residuals that others reuse durable. Returns its statistics.

        Raises RunCancelled when the run is stopped meanwhile, StaleWork when another incarnation has it, SegmentFailed
        when the latents are not finite, EntryLost when what it should reuse is gone, OutOfMemory.
        """
        self._adopted.check(spec)
        engine = self._ready_engine(spec, segment.index)
        leases = self._leases_of(spec, engine)
        append_event(spec.folder.events, "segment_begun", segment=segment.index, attempt=attempt)
        reusing = segment.index - spec.planned_from  # its number in the reuse plan
        made_again = 0
        if spec.config.continuity.commits_kv:
            leases = self._planned_behind_lost(spec, engine, leases, segment.index, attempt)
        elif leases is not None:
            made_again = self._make_lost_again(spec, engine, leases, reusing, attempt)
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
        self._values.set("edit_ray_kv_bytes", engine.figures.get("kv_bytes"))
        cached = cache_stats(engine.record, spec, segment)
        made = rounded(denoise_at=denoise_at, denoise_s=denoise_s, **engine.figures)
        stats = made | rounded(**cached, **reused) | {"latents_xxh3": digest}
        of = {"segment": segment.index, "take": segment.take, "attempt": attempt}
        of["edits"] = spec.storyboard.edits_of(segment.index)
        append_event(spec.folder.events, "segment_made", **of, plan=spec.residuals_id, figures=stats)
        return stats

    def _denoise(
        self, spec: RunSpec, engine: SegmentEngine, segment: SegmentPlan, store: PlannedStore | None
    ) -> tuple[torch.Tensor, float, float]:
        """The latents that a segment adds, when that began, and its seconds."""
        own = {"negative_prompt": segment.negative_prompt, "guidance_scale": segment.guidance_scale}
        sampling, times = spec.config.sampling.model_copy(update=own), StepTimes(self._values)

        def on_step(step: int, num_steps: int) -> None:
            times.step(engine.record)
            self._progress = Progress(spec.run_id, segment.index, step, num_steps)
            self._beats += 1
            self._adopted.check(spec)
            self._let_decoding_go_first(engine)

        def work() -> torch.Tensor:
            times.begin()
            conditions = conditions_of(engine, spec, segment, store)
            latents = engine.denoise(
                sampling,
                prompt=segment.prompt,
                seed=segment.seed,
                on_step=on_step,
                cache=spec.config.cache,
                segment_index=segment.index - spec.planned_from,
                store=store,
                lora_weights=segment.lora_weights,
                **conditions.arguments,
            )
            return added_by(latents, spec, segment.index, conditions.first)

        self._let_decoding_go_first(engine)
        return self._compute(engine, work, denoises=True)

    def _let_decoding_go_first(self, engine: SegmentEngine) -> None:
        """A step begins when no decoding waits or is in progress.

        At the same time they take as long as one by one, and a client gets its frames later.
        """
        if engine.device.type == "cuda":
            with self._decoding:
                return
        self._model.thread.yield_to_urgent()

    def _make_lost_again(
        self, spec: RunSpec, engine: SegmentEngine, leases: SegmentLeases, reusing: int, attempt: int
    ) -> int:
        """Denoise earlier segments again for residuals that the store has lost; returns how many.

        The same config, seed and hardware give the same bits, which is checked. A segment that itself reuses lost
        residuals comes after the segments of those; the first segment reuses none.
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
            if leases.lost(reusing, again):
                raise StoreDied(f"The store died after it got entries of segment {lost[-1]} again.")
        return made

    def _planned_behind_lost(
        self, spec: RunSpec, engine: SegmentEngine, leases: SegmentLeases | None, segment_index: int, attempt: int
    ) -> SegmentLeases | None:
        """The leases of K/V: if the store has lost some, by a plan that begins with this segment, from latents."""
        if leases is not None and leases.lost(segment_index - spec.planned_from, attempt):
            leases.close()
            leases = self._plan_leases(spec, engine, segment_index)
            self._leases[spec.key] = self._leases[spec.key][0], leases
        return leases

    def decode_segment(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """Decode one segment's new latents; the frames wait here to be encoded. Raises OutOfMemory at once."""
        self._adopted.check(spec)
        frames, decode_at, decode_s = self._decode(spec, segment, again=False)
        self._frames[spec.key, spec.media(segment.index), spec.incarnation] = frames
        return rounded(decode_at=decode_at, decode_s=decode_s, decode_tiled=spec.tiled(segment.index))

    def encode_segment(self, spec: RunSpec, segment: SegmentPlan) -> dict[str, float]:
        """Encode one segment's frames into its media file; frames that are gone are decoded again."""
        self._adopted.check(spec)
        media = spec.media(segment.index)
        frames = self._frames.get((spec.key, media, spec.incarnation))
        if frames is None:
            frames, _, _ = self._decode(spec, segment)
        encode_at, began = time.time(), time.perf_counter()
        known_init = read_bytes(spec.folder.init) if spec.folder.init.exists() else None
        fps, options, patience = spec.config.sampling.fps, spec.config.output, self._patience(spec)
        place = {"number": segment.index, "first_frame": segment.first_frame}
        encoded = encode(frames, fps=fps, options=options, **place, init=known_init, patience=patience)
        init, fragment = write_part(spec.folder.path, spec.part(segment), encoded)
        self._frames.pop((spec.key, media, spec.incarnation), None)
        times = {"encode_at": encode_at, "encode_s": time.perf_counter() - began}
        digests = {"init_xxh3": init, "media_xxh3": fragment}
        seen = self._measure_frames(spec, segment, frames)
        return rounded(media_bytes=media.stat().st_size, **times, **seen) | digests

    def finalize_run(self, spec: RunSpec, first: int) -> dict[str, float]:
        """Join the segments from `first` on, those before being dropped, into `final.mp4`."""
        self._adopted.check(spec)
        assert spec.num_segments is not None, "a run without an end has no final video"
        media = [spec.media(index) for index in range(first, spec.num_segments)]
        with replacing(spec.folder.final) as draft:
            join(spec.folder.init, media, draft.path, comment=spec.settings, patience=self._patience(spec))
            return {"final_xxh3": digest_of_file(draft.path, self._count_beat)}

    def _patience(self, spec: RunSpec) -> Patience:
        """Half of a step's time: an encoder that hangs ends before the watchdog finds that this actor hangs."""
        return Patience(spec.config.engine.step_timeout_s / 2, self._count_beat)

    def _count_beat(self) -> None:
        self._beats += 1

    def stop_run(self, run_id: str) -> None:
        """End the run's work in flight at its next step."""
        self._adopted.stop(run_id)

    def release_run(self, run_id: str) -> None:
        """Free what is kept for an ended run; the model stays loaded."""
        if spec := self._adopted.forget(run_id):
            self._free(spec)

    def _free(self, spec: RunSpec) -> None:
        self._progress = None
        self._values.set("edit_ray_kv_bytes", None)
        self._joins.forget(spec.key)
        _, leases = self._leases.pop(spec.key, (None, None))
        if leases is not None:
            leases.close()
        if self._model.engine is not None:
            self._model.engine.release(spec.key)
        for decoded in [decoded for decoded in self._frames if decoded[0] == spec.key]:
            del self._frames[decoded]

    def _measure_frames(self, spec: RunSpec, segment: SegmentPlan, frames: Frames) -> dict[str, float]:
        """The colour and sharpness of the segment, and how visible its join to its predecessor is."""
        before = spec.part(spec.segment(segment.index - 1)) if segment.index else None
        if before is not None and not (spec.folder.path / before.path).exists():
            before = None  # dropped before the run was re-rolled from here
        part, patience = spec.part(segment), self._patience(spec)
        return self._joins.measure(spec.key, spec.folder.path, part, before, frames, patience)

    def _ready_engine(self, spec: RunSpec, segment_index: int = 0) -> SegmentEngine:
        self._count_beat()
        return self._model.ready(spec, segment_index)

    def _decode(self, spec: RunSpec, segment: SegmentPlan, *, again: bool = True) -> tuple[Frames, float, float]:
        """The segment's frames, uint8 [F, H, W, 3], when their decoding began, and its seconds."""

        def work() -> torch.Tensor:
            return engine.decode(
                spec.stream(segment.index)[0] if spec.layout.one_stream else None,
                latents,
                position=spec.position(segment.index),
                preceding=preceding_of(spec, segment.index),
                keep_frames=spec.config.continuity.carried_frames,
                tiled_from=tiled_position(spec, segment.index),
            )

        with self._decoding:  # from the call on: the next segment's denoising is requested at the same moment
            engine = self._ready_engine(spec, segment.index)
            latents = load_latents(spec.latents(segment.index))
            frames, decode_at, decode_s = self._compute(engine, work, again=again)
        # A picture where others continue the segment before is seen by the model, and is not one frame more.
        shown = frames[1:] if segment.index and spec.stream(segment.index)[1] == segment.index else frames
        assert len(shown) == segment.num_frames, f"{len(shown)} frames decoded, {segment.num_frames} planned"
        return shown.numpy(), decode_at, decode_s

    def _compute(
        self, engine: SegmentEngine, work: Callable[[], T], *, denoises: bool = False, again: bool = True
    ) -> tuple[T, float, float]:
        """The result of the work, when it began (in unix seconds), and its seconds.

        On a CPU one thread does all of torch's work, unless torch has one thread only. OpenMP keeps a team of threads
        for each thread that calls it, and once two teams have more threads than there are cores, both sleep where they
        would spin: half the speed.

        If GPU memory runs out, all state that can be rebuilt is freed: the first time another attempt may succeed, and
        this raises SegmentFailed; the second time, or where `again` is False, OutOfMemory.
        """

        def timed() -> tuple[T, float, float]:
            torch.set_num_threads(self._model.threads)  # of this thread, if it has called torch before
            began, started = time.time(), time.perf_counter()
            return work(), began, time.perf_counter() - started

        one_by_one = engine.device.type == "cpu" and self._model.threads > 1
        try:
            submit = self._model.thread.submit if denoises else self._model.thread.submit_urgent
            return submit(timed).result() if one_by_one else timed()
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the work's tensors
            for _, leases in list(self._leases.values()):
                if denoises and leases is not None:
                    leases.free_device()
            engine.free_memory(of_cache=denoises)
            raise self._out_of_memory(error, again) from None

    def _out_of_memory(self, error: torch.OutOfMemoryError, again: bool) -> EditRayError:
        if self._short_of_memory or not again:
            return OutOfMemory(
                f"out of GPU memory ({str(error).splitlines()[0]}); lower sampling.height, width or "
                "num_frames, or take a smaller torch_dtype"
            )
        self._short_of_memory = True
        return SegmentFailed("out of GPU memory; all state that can be rebuilt was freed")

    def _leases_of(self, spec: RunSpec, engine: SegmentEngine) -> SegmentLeases | None:
        """The run's leases. Those of an earlier incarnation are closed, and the store is told of the run again; those
        of K/V also when the storyboard has changed.
        """
        changes = spec.storyboard.changes if spec.config.continuity.commits_kv else ()
        wanted = spec.incarnation, spec.replanned, changes
        known, leases = self._leases.get(spec.key, (None, None))
        if known == wanted:
            return leases
        if leases is not None:
            leases.close()
        reuses = spec.config.cache.reuse_window or spec.config.continuity.commits_kv
        leases = self._plan_leases(spec, engine, spec.planned_from) if reuses else None
        self._leases[spec.key] = (wanted, leases)
        return leases

    def _plan_leases(self, spec: RunSpec, engine: SegmentEngine, start: int) -> SegmentLeases | None:
        planned = self._model.thread.submit(reuse_of, engine, spec, start).result()
        return None if planned is None else SegmentLeases(self._store, spec.reusing, planned)
