"""What the GPU actor's calls are made of: adopted runs, the loaded model, a segment's context, statistics of steps."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.cache.records import Record
from edit_ray.config.scenes import picture_files
from edit_ray.engine.causal_segment import CausalSegmentEngine, ChunkBefore, KVPlan
from edit_ray.engine.continuity import latent_tail, load_latents, match_statistics
from edit_ray.engine.init_file import picture_arguments, pictures_digest
from edit_ray.engine.loading import usable_cores
from edit_ray.engine.lora_files import weights_digest
from edit_ray.engine.segment import KEPT_PROMPTS, SegmentEngine
from edit_ray.engine.vae_stream import Preceding
from edit_ray.errors import HardwareDiffers, NotAdopted, RunCancelled, StaleWork
from edit_ray.files import write_atomic
from edit_ray.metrics.collect import MetricValues
from edit_ray.runs.causal_plan import (
    ChunkSizes,
    KVUses,
    SeenChunk,
    kv_uses,
    rolled_chunks,
    seen_chunks,
    slots_held,
)
from edit_ray.runs.run_plan import SegmentPlan
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.store_client import PlannedStore

T = TypeVar("T")


class AdoptedRuns:
    """The runs that a GPU actor works for, one of each id, each in the incarnation that was adopted last."""

    def __init__(self) -> None:
        self._adopted: dict[str, RunSpec] = {}
        self._stopped: set[str] = set()

    def adopt(self, spec: RunSpec) -> RunSpec | None:
        """Work for this incarnation from now on, unless a later one was adopted.

        Returns the run that had the id before, if it was another one.
        """
        known = self._adopted.get(spec.run_id)
        if known is None or known.key != spec.key or known.incarnation < spec.incarnation:
            self._adopted[spec.run_id] = spec
            self._stopped.discard(spec.run_id)
        return known if known is not None and known.key != spec.key else None

    def stop(self, run_id: str) -> None:
        """Have `check` refuse the run until it is adopted again."""
        self._stopped.add(run_id)

    def forget(self, run_id: str) -> RunSpec | None:
        """Return the run as it was adopted last."""
        self._stopped.discard(run_id)
        return self._adopted.pop(run_id, None)

    def check(self, spec: RunSpec) -> None:
        """Raise NotAdopted, StaleWork or RunCancelled if nobody waits for this run's work."""
        known = self._adopted.get(spec.run_id)
        if known is None:
            raise NotAdopted(f"this GPU actor has not adopted the run {spec.run_id}")
        if known.key != spec.key:
            raise StaleWork(f"the run id {spec.run_id} belongs to another run now")
        if known.incarnation > spec.incarnation:
            raise StaleWork(f"run {spec.run_id} lives in a later incarnation than {spec.incarnation}")
        if spec.run_id in self._stopped:
            raise RunCancelled(f"run {spec.run_id} was stopped")


class OneThread(ThreadPoolExecutor):
    """A thread that does one piece of work after the other; urgent work is done between two steps of the others."""

    def __init__(self, name: str) -> None:
        self._urgent: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._ident = 0
        super().__init__(1, name, self._begin)

    def _begin(self) -> None:
        self._ident = threading.get_ident()

    def submit_urgent(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done at the next `yield_to_urgent`, or in its turn."""
        future: Future[T] = Future()
        self._urgent.append((future, work))
        self.submit(self.yield_to_urgent)
        return future

    def yield_to_urgent(self) -> None:
        """Between two steps: do the urgent work. Nothing happens in another thread."""
        while self._urgent and threading.get_ident() == self._ident:
            future, work = self._urgent.popleft()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


class LoadedModel:
    """The engine of the last model that was loaded, and the thread that runs torch on a CPU."""

    def __init__(self) -> None:
        self.engine: SegmentEngine | None = None
        self.loaded_for: object = None
        self.loading = False
        self.thread = OneThread("torch")
        self._weights: object = None  # the digests of the loaded files
        self.threads = 0  # of torch

    def forget_replaced(self, spec: RunSpec) -> None:
        """Have the model loaded again if the files at its path are no longer those that were loaded."""
        if self._weights != weights_digest(spec.config.model):
            self.loaded_for = None

    def ready(self, spec: RunSpec, segment_index: int = 0) -> SegmentEngine:
        """The engine of this run's model, with its prompts encoded (of very many, only those nearby)."""
        return self.thread.submit_urgent(lambda: self._load_for(spec, segment_index)).result()

    def _load_for(self, spec: RunSpec, segment_index: int) -> SegmentEngine:
        config = spec.config
        self.threads = config.engine.cpu_threads or usable_cores()  # Ray would leave one
        kind = CausalSegmentEngine if config.continuity.causal else SegmentEngine
        wanted = config.model, config.engine.cfg_parallel, kind
        self.loading = True
        try:
            if self.engine is None or self.loaded_for != wanted:
                self.engine = None  # frees the last model before the next one is loaded
                weights = weights_digest(config.model)
                self.engine = kind.load(config.model, self.threads, cfg_parallel=config.engine.cfg_parallel)
                self.loaded_for, self._weights = wanted, weights
            torch.set_num_threads(self.threads)
            self.engine.max_live_decoders = config.engine.max_live_decoders
            self.engine.use_mode(config.engine.mode, fp8=config.engine.fp8)
            texts = spec.texts(segment_index, KEPT_PROMPTS)
            self.engine.encode_prompts(texts)  # hundreds of prompts take as long as a model
        finally:
            self.loading = False
        return self.engine


# What a segment takes from those before it and adds to the run's stream, from committed files alone.


@dataclass(frozen=True)
class SegmentInput:
    """What a segment is conditioned on besides its prompt.

    `arguments` are those of `SegmentEngine.denoise`. `first` [1, C, 1, h, w] is the latent of the picture that it
    begins with, which takes the place of its first one.
    """

    arguments: Mapping[str, Any]
    first: torch.Tensor | None = None


def added_by(latents: torch.Tensor, spec: RunSpec, segment_index: int, first: torch.Tensor | None) -> torch.Tensor:
    """The latents of a window that the segment adds to its stream, with their colours matched to the run's first.

    `first` is that of the segment's `SegmentInput`.
    """
    index, first_latent, adain = segment_index, spec.layout.first_latent, spec.config.continuity.adain
    index -= spec.stream(index)[1]
    added = latents[:, :, first_latent(index) - first_latent(index + 1) :]
    if first is not None:
        return torch.cat([first, added[:, :, 1:]], dim=2)
    if adain and index:
        return match_statistics(added, load_latents(spec.latents(0)), adain)
    return added


def conditions_of(
    engine: SegmentEngine, spec: RunSpec, segment: SegmentPlan, store: PlannedStore | None = None
) -> SegmentInput:
    """What a segment takes from those before it, and from the user's pictures.

    Raises ConfigError if a picture cannot be read, HardwareDiffers if one has changed since the run was begun.
    """
    continuity, index = spec.config.continuity, segment.index
    if (window := window_of(engine, spec)) is not None:
        return SegmentInput({"continuity": continuity, **_causal_arguments(spec, index, window, store)})
    given = _read_pictures(spec, segment)
    image = given.pop("image", None)
    frame = None if image is None else np.asarray(image)[None]
    stream, start = spec.stream(index)
    if frame is not None and (index == start or not continuity.carried_latents):
        shown = engine.picture(continuity, frame)
        history = shown.get("history")
        if history is None:
            return SegmentInput(given | shown)
        return SegmentInput(given | {"history": history[:, :, -1:]}, history[:, :, :1])
    if index == 0:
        if not continuity.init_latents:
            return SegmentInput(given)
        init = load_latents(spec.folder.init_latents)
        first = init[:, :, :1] if continuity.begins_with_picture else None
        return SegmentInput(given | {continuity.mode: init[:, :, -continuity.init_latents :]}, first)
    context = engine.context(
        continuity,
        stream,
        position=spec.position(index),
        preceding=preceding_of(spec, index),
        tiled_from=tiled_position(spec, index),
        picture=frame,
    )
    return SegmentInput(given | context)


def window_of(engine: SegmentEngine, spec: RunSpec) -> ChunkSizes | None:
    """The sizes of a causal model's window in this run; None for other models."""
    if not isinstance(engine, CausalSegmentEngine):
        return None
    options = engine.use_options(spec.config.continuity, spec.config.sampling)
    return ChunkSizes(options.chunk_size, options.window, options.sink)


def _causal_arguments(
    spec: RunSpec, segment_index: int, sizes: ChunkSizes, store: PlannedStore | None
) -> dict[str, Any]:
    """What a segment of a causal model begins with: the slots of stored K/V, or the chunks that it is computed from."""
    if not spec.config.continuity.commits_kv:
        seen = seen_chunks(spec.storyboard, segment_index, sizes)
    elif store is not None and store.planned_reads():
        return {"slots": slots_held(spec.storyboard, segment_index, sizes)}
    else:
        seen = rolled_chunks(spec.storyboard, segment_index, sizes)
    return {"before": chunks_before(spec, seen, sizes.chunk_size)}


def reuse_of(engine: SegmentEngine, spec: RunSpec, start: int) -> Reuse | None:
    """What the run's segments reuse of each other: residuals; or K/V, by a plan in which segment `start` reads none."""
    end = spec.num_segments
    assert end is not None, "the reuse plan covers all segments"
    if isinstance(engine, CausalSegmentEngine):
        window = window_of(engine, spec)
        assert window is not None, "it is that of a causal model"
        uses = [
            kv_uses(spec.storyboard, index, window, start, end) if index >= start else KVUses()
            for index in range(spec.planned_from, end)
        ]
        return engine.plan_kv(spec.config.sampling, KVPlan(spec.residuals_id, spec.planned_from, uses))
    config = spec.config
    planned = spec.residuals_id, end - spec.planned_from, config.cache, config.sampling
    return engine.plan_reuse(*planned, config.store.disk_bytes)


def chunks_before(spec: RunSpec, seen_by_it: Sequence[SeenChunk], chunk_size: int) -> list[ChunkBefore]:
    """Committed chunks, read from their files."""
    files: dict[int, torch.Tensor] = {}
    chunks = []
    for seen in seen_by_it:
        if seen.segment not in files:
            files[seen.segment] = load_latents(spec.latents(seen.segment))
        latents = files[seen.segment][:, :, seen.first_latent : seen.first_latent + chunk_size]
        texts = spec.segment(seen.prompt_of)
        chunks.append(ChunkBefore(seen.number, latents, texts.prompt, texts.negative_prompt))
    return chunks


def _read_pictures(spec: RunSpec, segment: SegmentPlan) -> dict[str, Any]:
    """The segment's pictures as the pipeline's arguments, if they are those that the run was begun with."""
    if segment.pictures.paths and spec.pictures not in (None, pictures_digest(picture_files(spec.config))):
        raise HardwareDiffers(
            f"a picture of run {spec.run_id!r} was edited while the run was active; put it back, then run "
            f"`edit-ray resume {spec.run_id}`"
        )
    sampling = spec.config.sampling
    return picture_arguments(segment.pictures, height=sampling.height, width=sampling.width)


def tiled_position(spec: RunSpec, segment_index: int) -> int | None:
    """The first latent of the segment's stream that is decoded in tiles."""
    start = spec.stream(segment_index)[1]
    return None if spec.first_tiled is None else spec.layout.first_latent(max(0, spec.first_tiled - start))


def preceding_of(spec: RunSpec, segment_index: int) -> Preceding:
    """Read the last latents of the stream before a segment."""

    def preceding(count: int) -> torch.Tensor:
        start = spec.stream(segment_index)[1]
        segments = range(max(start, segment_index - count), segment_index)  # each adds one latent at least
        before = [spec.latents(index) for index in segments]
        if spec.layout.init_latents and segments.start == 0:
            before.insert(0, spec.folder.init_latents)
        return latent_tail(before, count)

    return preceding


# Statistics, by the names of the metrics catalog and of the manifest.


def cache_stats(record: Record | None, spec: RunSpec, segment: SegmentPlan) -> dict[str, int]:
    """The steps and units of a segment that were computed and skipped, by branch. Writes the record of decisions.

    A step of a branch counts as skipped if all its units were reused. Without a record everything was computed.
    """
    if record is None:
        branches = ("cond", "uncond") if segment.guidance_scale > 1 else ("cond",)
        steps = spec.config.sampling.num_inference_steps
        steps *= spec.config.continuity.chunks if spec.config.continuity.causal else 1
        return {f"steps_computed_{branch}": steps for branch in branches}
    stats: dict[str, int] = defaultdict(int, units_computed=0, units_skipped=0)
    for (branch, _), counts in record.counts("branch", "step").items():
        stats[f"steps_{'computed' if counts.computed else 'skipped'}_{branch}"] += 1
        for decision, number in (("computed", counts.computed), ("skipped", counts.skipped)):
            stats[f"units_{decision}"] += number
            stats[f"units_{decision}_{branch}"] += number
    write_atomic(spec.folder.record(segment.index, segment.take), record.to_json().encode())
    return dict(stats)


class StepTimes:
    """Observes the seconds of each step of one segment."""

    def __init__(self, values: MetricValues) -> None:
        self._values = values
        self.begin()

    def begin(self) -> None:
        """The first step begins."""
        self._since, self._seen = time.perf_counter(), 0

    def step(self, record: Record | None) -> None:
        """A step has ended; the last decisions of `record` are its own."""
        now = time.perf_counter()
        decisions = () if record is None else record.decisions[self._seen :]
        self._seen += len(decisions)
        skipped = bool(decisions) and all(decision.decision == "reuse" for decision in decisions)
        self._values.observe("edit_ray_step_seconds", now - self._since, decision="skipped" if skipped else "computed")
        self._since = now


def show_memory(values: MetricValues, device: torch.device) -> None:
    """Set the gauges of torch's memory on a CUDA device; on other devices there are none."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        held = {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
        for kind, value in {**held, "total": total}.items():
            values.set("edit_ray_gpu_memory_bytes", value, kind=kind)
