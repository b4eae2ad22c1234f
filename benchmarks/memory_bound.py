"""Forecasting every block's residual with less memory than that takes: without tiers, with tiers, and the peers.

    python benchmarks/memory_bound.py --output benchmarks/results/memory_bound      on a GPU, capped at 24 GB
    python benchmarks/memory_bound.py --quick                                       a toy on a CPU, without a cap

TaylorSeer with a unit for each block keeps `max_order` + 1 residuals of every block and branch, and reads them all in
every skipped step. The process is capped with `torch.cuda.set_per_process_memory_fraction`. With tiers, as many units
as do not fit have their residuals in pinned host memory. Times are of the denoising loop, medians of alternating runs.
"""

import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from diffusers import TaylorSeerCacheConfig

from benchmarks.gpu_results import LeftOut, Results, arguments
from benchmarks.methods import Pipelines, cache_dit
from benchmarks.real_size import Task, embeds, generate, make_pipe, memory_peak, stock_pipe, synchronise, task_for
from benchmarks.wan_table import our_cache
from edit_ray.cache import CPUOffloadStore, GPUStore, TieredStore
from edit_ray.cache.stores.spread import SpreadStore
from edit_ray.engine.reuse import residual_form

UNCAPPED, WITHOUT = "ours, all in VRAM, no cap", "ours, all in VRAM, capped"
WITH, BY_RECENCY = "ours, tiers, capped", "ours, tiers by recency, capped"
OUT_OF_MEMORY = "out of memory"
AHEAD = 4  # entries on their way
FRAGMENTS = 0.2  # of the cap: what the allocator holds and cannot give
On = Callable[[], AbstractContextManager[Any]]


class Bench:
    """Loops of one model under a cap or without."""

    def __init__(self, results: Results, task: Task, device: str, cap: float, max_order: int) -> None:
        self.results, self.task, self.device, self.max_order = results, task, device, max_order
        self.pipe = make_pipe(task, device)
        self.stock, self.given = stock_pipe(self.pipe), embeds(self.pipe)
        self.cap, self._latents = cap, dict[str, torch.Tensor]()
        self.entry = residual_form(self.pipe, task.sampling).size
        self.needed = (max_order + 1) * 2 * len(self.pipe.transformer.blocks) * self.entry
        results.note(f"{self.needed / 2**30:.1f} GiB of residuals, of {self.entry / 1e6:.1f} MB each")

    def measure(self, name: str, pipe: Any, on: On, capped: bool) -> None:
        """A loop; one that runs out of memory is a result too."""
        if not self.results.time_for(name):
            return
        with self.results.row(name) as figures, self._capped(capped):
            memory_peak(self.device, reset=True)
            steps: list[int] = []
            try:
                with on():
                    synchronise(self.device)
                    started = time.perf_counter()
                    latents = generate(pipe, self.task, self.given, callback_on_step_end=partial(_note_step, steps))
                    synchronise(self.device)
                self._latents[name] = latents.cpu()
                each = [*figures.get("each", []), time.perf_counter() - started]
                figures.update(outcome="done", seconds=median(each), times=len(each), each=each)
            except torch.OutOfMemoryError:
                figures.update(outcome=f"{OUT_OF_MEMORY} after {len(steps)} of {self.task.num_inference_steps} steps")
            figures["ours"] = pipe is self.pipe
            if self.device == "cuda":
                figures["peak_GB"] = (memory_peak(self.device) or 0) / 1e9
            full = self.results.of(UNCAPPED).get("seconds")
            if name != UNCAPPED and full and "seconds" in figures:
                figures["ratio"] = figures["seconds"] / full
                if pipe is self.pipe:
                    figures["equal"] = torch.equal(self._latents[name], self._latents[UNCAPPED])
        self.free()

    def forecasting(self, store: Any = None) -> AbstractContextManager[Any]:
        """Our cache, with residuals in a store."""
        options = {"granularity": "per_block", "max_order": self.max_order}
        return our_cache(self.pipe, "taylorseer", self.task.num_inference_steps, store=store, **options)

    def host_share(self) -> float:
        """Of the units, so that the rest fits under the cap beside what the loop itself takes."""
        peak = self.results.of(UNCAPPED).get("peak_GB")
        if self.device != "cuda" or peak is None:
            return 0.3
        itself = peak * 1e9 - self.needed
        room = (1 - FRAGMENTS) * self.cap - itself - (4 * AHEAD + 2) * self.entry  # the last is on its way
        units = 2 * len(self.pipe.transformer.blocks)
        share: float = min(1.0, math.ceil(units * max(0.0, 1 - room / self.needed)) / units + 1e-9)
        self.results.note(f"the loop itself takes {itself / 1e9:.1f} GB; {share:.0%} of the residuals are on the host")
        return float(share)

    def _capped(self, capped: bool) -> AbstractContextManager[None]:
        if self.device != "cuda":
            return nullcontext()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.cap / total) if capped else 1.0)
        return nullcontext()

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def _note_step(steps: list[int], _pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    steps.append(step)
    return tensors


def peer_rows(bench: Bench) -> None:
    """What others make of it under the cap."""

    class Enabled:
        """diffusers' TaylorSeer; without names of modules it finds none in Wan, so they are given."""

        def __enter__(self) -> None:
            config = TaylorSeerCacheConfig(max_order=bench.max_order, cache_identifiers=[r"blocks\.\d+"])
            bench.stock.transformer.enable_cache(config)

        def __exit__(self, *error: object) -> None:
            bench.stock.transformer.disable_cache()

    bench.measure("diffusers TaylorSeer on blocks, capped", bench.stock, Enabled, capped=True)

    def on() -> AbstractContextManager[Any]:
        if find_spec("cache_dit") is None:
            raise LeftOut("cache-dit is not installed")
        pipelines = Pipelines(bench.pipe, bench.stock, bench.task.num_inference_steps)
        return cache_dit(taylorseer=True)(pipelines, {"residual_diff_threshold": 1e9})

    name = "cache-dit DBCache + TaylorSeer, capped"  # of the stack, not of each block
    bench.measure(name, bench.stock, on, capped=True)


def with_tiers(bench: Bench) -> tuple[SpreadStore, float]:
    """The row with tiers, measured once: its store, and how much of it is on the host."""
    share = bench.host_share()
    while True:
        store = SpreadStore(share, ahead=AHEAD)
        with bench.forecasting(store):  # pinned memory takes its time, once
            generate(bench.pipe, bench.task, bench.given)
        bench.free()
        bench.measure(WITH, bench.pipe, partial(bench.forecasting, store), capped=True)
        found = bench.results.of(WITH)
        if share >= 1 or not str(found.get("outcome")).startswith(OUT_OF_MEMORY):
            return store, share
        bench.results.note(f"with {share:.0%} of the residuals on the host it ran {OUT_OF_MEMORY}")
        share = min(1.0, share + 0.1)


def measure(bench: Bench, repeats: int, by_recency: bool) -> None:
    """All rows."""
    bench.measure(UNCAPPED, bench.pipe, bench.forecasting, capped=False)
    if bench.device == "cuda":
        bench.measure(WITHOUT, bench.pipe, bench.forecasting, capped=True)
    if "seconds" in bench.results.of(UNCAPPED):
        store, share = with_tiers(bench)
        for _ in range(repeats - 1):
            bench.measure(UNCAPPED, bench.pipe, bench.forecasting, capped=False)
            bench.measure(WITH, bench.pipe, partial(bench.forecasting, store), capped=True)
        bench.results.of(WITH).update(host_share=share)
        del store
        bench.free()
        if by_recency:
            on_device = int((1 - share) * bench.needed)
            tiers = TieredStore([(GPUStore(), on_device), (CPUOffloadStore(), None)], promote=False)
            bench.measure(BY_RECENCY, bench.pipe, partial(bench.forecasting, tiers), capped=True)
    peer_rows(bench)


def main() -> None:
    """Measure, print, write."""
    args = arguments(
        __doc__ or "",
        seconds=90,
        steps={"type": int, "default": 15},
        num_frames={"type": int, "default": 69},
        max_order={"type": int, "default": 3},
        cap={"type": float, "default": 24.0, "help": "GB"},
        repeats={"type": int, "default": 2},
        by_recency={"action": "store_true", "help": "also a TieredStore, which goes by recency"},
    )
    frames = None if args.quick else args.num_frames
    task = task_for(args.quick, num_inference_steps=args.steps, num_frames=frames)
    told = {"quick": args.quick, "cap_GB": args.cap, "policy": "taylorseer, per_block", "max_order": args.max_order}
    results = Results(args, task.told() | told, figure="seconds")
    bench = Bench(results, task, args.device, args.cap * 1e9, args.max_order)
    generate(bench.pipe, task, bench.given, num_inference_steps=2)  # a first call is slow
    measure(bench, args.repeats, args.by_recency or args.quick)
    if not args.quick:
        results.bar("tiers, capped / all in VRAM without a cap", results.of(WITH).get("ratio"), most=1.10)
    results.finish()


if __name__ == "__main__":
    main()
