"""A long video whose segments reuse each other's residuals: what bounded tiers cost beside everything in VRAM.

    python benchmarks/long_video.py --output benchmarks/results/long_video     on a GPU, the CacheStore actor on Ray
    python benchmarks/long_video.py --no-ray                                   its class in a process of its own
    python benchmarks/long_video.py --quick                                    a toy on a CPU

Segments of one run with a reuse window of 4 and a unit for each block: the first step of a segment writes a residual
of every unit and branch, or reads it. Device and host together hold little more than one segment's, disk has the rest.
All are made by the GPU actor's class, one call after the other: with everything in VRAM, with prefetch, and five of
them without (then nothing comes to the device before it is asked for). A segment's seconds are those of
`denoise_segment`. To be done soon, a segment has few steps; a longer one has more time to hide in, and as much to hide.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch

from benchmarks.gpu_actor import DeviceDenoiser, ReadyDenoiser, config_of, spec_of
from benchmarks.gpu_results import MODE, Results, arguments
from benchmarks.provenance import ROOT
from benchmarks.real_size import Task, make_pipe, memory_peak, synchronise, task_for
from benchmarks.store_process import AnyStore, RayStore, StoreProcess
from edit_ray.cache.options import CacheOptions
from edit_ray.engine.reuse import residual_form
from edit_ray.engine.segment import SegmentEngine
from edit_ray.tiers.protocol import EntryForm
from edit_ray.tiers.slots import slot_bytes

WINDOW = 4
DEVICE_SHARE, HOST_SHARE = 0.5, 0.6  # of the bytes that one segment reads
IN_VRAM, AHEAD, AT_ONCE = "all in VRAM", "bounded, prefetch on", "bounded, prefetch off"


class Bench:
    """Makes whole runs, and notes each segment."""

    def __init__(self, results: Results, task: Task, device: str, segments: int, folder: Path) -> None:
        self.results, self.task, self.device, self.segments = results, task, device, segments
        self.folder, self.mode = folder, results.content["task"]["mode"]
        self.engine = SegmentEngine(make_pipe(task, device))
        self.form: EntryForm = residual_form(self.engine.pipe, task.sampling)
        self.cache = CacheOptions(
            policy="warmstart_reuse",
            reuse_window=WINDOW,
            granularity="per_block",
            **{"warm_steps": 1, "inner": "always"},  # type: ignore[arg-type]  # the policy's own
        )
        self.entries = 2 * len(self.engine.pipe.transformer.blocks)

    def bounds(self, prefetch: bool) -> dict[str, Any]:
        """The store's options: the same host tier with and without prefetch."""
        room = slot_bytes(self.form.size)
        return {
            "device_bytes": int(DEVICE_SHARE * self.entries) * self.form.size if prefetch else 0,
            "host_bytes": int(HOST_SHARE * self.entries) * room,
            "directory": str(self.folder / "tiers"),
            "allow_tmpfs": True,
        }

    def measure(self, name: str, store: AnyStore) -> None:
        """A run; its row grows with each segment."""
        options = self.bounds(prefetch=name != AT_ONCE)
        engine = {"mode": self.mode}
        config = config_of(self.task, self.device, self.segments, cache=self.cache, store=options, engine=engine)
        kind = DeviceDenoiser if name == IN_VRAM else ReadyDenoiser
        actor = kind(store, self.engine, config)
        spec = spec_of(self.folder, name.replace(" ", "-").replace(",", "").lower(), config)
        actor.prepare_run(spec)
        each: list[dict[str, Any]] = []
        try:
            for index in range(self.segments if name != AT_ONCE else min(self.segments, WINDOW + 1)):
                if not self.results.time_for(f"{name}, segment {index}"):
                    return
                with self.results.row(name) as figures:
                    each.append(self._segment(actor, spec, index))
                    figures.update(self._figures(name, each, options), each=each)
                if len(each) <= index:
                    return
        finally:
            actor.release_run(spec.run_id)
            store.call("drop_run", spec.residuals_id)()
            self.engine.free_memory(of_cache=True)
            shutil.rmtree(self.folder / "tiers", ignore_errors=True)

    def _segment(self, actor: ReadyDenoiser, spec: Any, index: int) -> dict[str, Any]:
        memory_peak(self.device, reset=True)
        synchronise(self.device)
        started = time.perf_counter()
        said = actor.denoise_segment(spec, spec.segment(index), 0)
        synchronise(self.device)
        found: dict[str, Any] = {"seconds": time.perf_counter() - started}
        if self.device == "cuda":
            found |= {"allocated": torch.cuda.memory_allocated(), "peak": memory_peak(self.device)}
        moved = said.get("reuse_read_bytes", 0) + said.get("reuse_written_bytes", 0)
        told = ("reuse_wait_s", "complete_s", "prefetch_requested", "prefetch_late", "host_bytes", "disk_bytes")
        return found | {"moved_bytes": moved} | {key: said[key] for key in told if key in said}

    def _figures(self, name: str, each: Sequence[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        """Of all segments so far; those that read, from the second on, are the steady state."""
        steady = [of for index, of in enumerate(each) if _reads(index)]
        found: dict[str, Any] = {
            "ours": True,
            "segments": len(each),
            "seconds": median(of["seconds"] for of in steady or each),
            "moved_GB": median(of["moved_bytes"] for of in each) / 1e9,
            "waited_s": sum(of.get("reuse_wait_s", 0.0) for of in each),
        }
        if name != IN_VRAM:
            found["device_GB"], found["host_GB"] = options["device_bytes"] / 1e9, options["host_bytes"] / 1e9
        other = self.results.of(IN_VRAM).get("each") if name != IN_VRAM else None
        if other:
            ratios = [of["seconds"] / to["seconds"] for of, to in zip(each, other, strict=False)]
            found["ratio"] = median(ratios[1:] or ratios)
            sums = [sum(of["seconds"] for of in segments) for segments in (each, other[: len(each)])]
            found["ratio_of_sums"] = sums[0] / sums[1]
        if self.device == "cuda":
            allocated = [of["allocated"] for of in each]
            found["allocated_GB"] = [round(of / 1e9, 3) for of in allocated]
            found["allocated_spread"] = (max(allocated) - min(allocated)) / min(allocated)
            found["peak_GB"] = max(of["peak"] for of in each) / 1e9
        return found


def _reads(segment: int) -> bool:
    """Whether a segment reads what one before it has written; the others write."""
    return segment % (WINDOW + 1) != 0


def main() -> None:
    """Measure, print, write."""
    args = arguments(
        __doc__ or "",
        seconds=150,
        mode=MODE,
        steps={"type": int, "default": 12},
        segments={"type": int},
        no_ray={"action": "store_true"},
        directory={"type": Path, "default": ROOT / "runs", "help": "on the disk of the disk tier"},
    )
    task = task_for(args.quick, num_inference_steps=4 if args.quick else args.steps)
    segments = args.segments or (3 if args.quick else 8)
    told = {
        "quick": args.quick,
        "mode": args.mode,
        "segments": segments,
        "reuse_window": WINDOW,
        "granularity": "per_block",
    }
    results = Results(args, task.told() | told, figure="seconds")
    args.directory.mkdir(parents=True, exist_ok=True)
    store: AnyStore = StoreProcess() if args.no_ray or args.quick else RayStore()
    try:
        with tempfile.TemporaryDirectory(dir=args.directory, prefix="long_video-") as folder:
            bench = Bench(results, task, args.device, segments, Path(folder))
            results.note(f"{task.num_inference_steps} steps a segment, so that the whole takes little of a GPU")
            bench.engine.use_mode(args.mode)
            bench.engine.denoise(task.sampling.model_copy(update={"num_inference_steps": 2}), prompt="a circle", seed=1)
            for name in (IN_VRAM, AHEAD, AT_ONCE):
                bench.measure(name, store)
    finally:
        store.close()
    if not args.quick:
        results.bar("bounded with prefetch / all in VRAM, per segment", results.of(AHEAD).get("ratio"), most=1.01)
        of_sums = results.of(AHEAD).get("ratio_of_sums")
        results.bar("the same of all segments together, those that write and the first that read", of_sums, most=1.01)
        spread = results.of(AHEAD).get("allocated_spread")
        results.bar("allocated memory after each segment, spread", spread, most=0.01)
        results.bar("cache traffic of a segment, GB", results.of(AHEAD).get("moved_GB"), least=2.0)
    results.finish()


if __name__ == "__main__":
    main()
