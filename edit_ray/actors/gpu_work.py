"""What the GPU actor's calls are made of: adopted runs, the loaded model, a segment's context, statistics of steps."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.cache.records import Record
from edit_ray.engine.continuity import latent_tail, load_latents, match_statistics
from edit_ray.engine.loading import usable_cores
from edit_ray.engine.model_files import model_digest
from edit_ray.engine.segment import KEPT_PROMPTS, SegmentEngine
from edit_ray.engine.vae_stream import Preceding
from edit_ray.errors import NotAdopted, RunCancelled, StaleWork
from edit_ray.files import write_atomic
from edit_ray.metrics.collect import MetricValues
from edit_ray.runs.run_plan import SegmentPlan

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
        """Returns the run as it was adopted last."""
        self._stopped.discard(run_id)
        return self._adopted.pop(run_id, None)

    def check(self, spec: RunSpec) -> None:
        """Raises NotAdopted, StaleWork or RunCancelled if nobody waits for this run's work."""
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
        self._weights: str | None = None  # the digest of the loaded files
        self.threads = 0  # of torch

    def forget_replaced(self, spec: RunSpec) -> None:
        """Have the model loaded anew if the files at its path are no longer those that were loaded."""
        if self._weights != model_digest(spec.config.model.path, spec.config.model.files.values()):
            self.loaded_for = None

    def ready(self, spec: RunSpec, segment_index: int = 0) -> SegmentEngine:
        """The engine of this run's model, with the run's prompts encoded, or of very many those around this segment."""
        return self.thread.submit_urgent(lambda: self._load_for(spec, segment_index)).result()

    def _load_for(self, spec: RunSpec, segment_index: int) -> SegmentEngine:
        config = spec.config
        self.threads = config.engine.cpu_threads or usable_cores()  # Ray would leave one
        wanted = config.model, config.engine.cfg_parallel
        self.loading = True
        try:
            if self.engine is None or self.loaded_for != wanted:
                self.engine = None  # frees the last model before the next one is loaded
                weights = model_digest(config.model.path, config.model.files.values())
                self.engine = SegmentEngine.load(config.model, self.threads, cfg_parallel=config.engine.cfg_parallel)
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


def added_by(latents: torch.Tensor, spec: RunSpec, segment_index: int) -> torch.Tensor:
    """Those of a window's latents that the segment adds to the stream, with their colours matched to the first segment.

    If the run begins with the user's picture, the first latent is the picture's.
    """
    first_latent, continuity = spec.layout.first_latent, spec.config.continuity
    added = latents[:, :, first_latent(segment_index) - first_latent(segment_index + 1) :]
    if segment_index == 0 and continuity.begins_with_picture:
        return torch.cat([load_latents(spec.folder.init_latents)[:, :, :1], added[:, :, 1:]], dim=2)
    if continuity.adain and segment_index:
        return match_statistics(added, load_latents(spec.latents(0)), continuity.adain)
    return added


def context_of(engine: SegmentEngine, spec: RunSpec, segment_index: int) -> dict[str, torch.Tensor]:
    """A segment's context latents, as arguments of `SegmentEngine.denoise`."""
    continuity = spec.config.continuity
    if segment_index == 0:
        if continuity.init is None:
            return {}
        return {continuity.mode: load_latents(spec.folder.init_latents)[:, :, -continuity.init_latents :]}
    position, preceding = spec.layout.first_latent(segment_index), preceding_of(spec, segment_index)
    tiled_from = tiled_position(spec)
    return engine.context(continuity, spec.key, position=position, preceding=preceding, tiled_from=tiled_from)


def tiled_position(spec: RunSpec) -> int | None:
    """The first latent of the run's stream that is decoded in tiles."""
    return None if spec.first_tiled is None else spec.layout.first_latent(spec.first_tiled)


def preceding_of(spec: RunSpec, segment_index: int) -> Preceding:
    """Reads the last latents of the stream before a segment."""

    def preceding(count: int) -> torch.Tensor:
        segments = range(max(0, segment_index - count), segment_index)  # each adds one latent at least
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
        return {f"steps_computed_{branch}": spec.config.sampling.num_inference_steps for branch in branches}
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
