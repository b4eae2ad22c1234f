"""The table of a cached Wan: time, speedup and memory at 0, 11, 17 and 20 of 30 steps skipped, beside the peers.

    python benchmarks/wan_table.py --output benchmarks/results/wan_table       random weights, on a GPU
    python benchmarks/wan_table.py --model DIR                                 real ones, TeaCache at 0.1, 0.2 and 0.3
    python benchmarks/wan_table.py --quick                                     a toy on a CPU

What a threshold skips depends on the weights, so with random ones masks say it, the same for all: our policy
`schedule`, and each peer told which steps to skip. Times are of the denoising loop, scheduler steps included, without
text encoder and VAE; rows alternate. First, latents are compared bit for bit: diffusers, ours, every policy of ours
where it never skips.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from torch import Tensor

from benchmarks.gpu_results import LeftOut, Results, arguments
from benchmarks.peers import PEERS, Enable
from benchmarks.real_size import (
    MODES,
    PROMPT,
    SEED,
    Task,
    compiled_graphs,
    decoding,
    embeds,
    generate,
    make_pipe,
    mask_of,
    memory_peak,
    stock_pipe,
    synchronise,
    task_for,
    use,
)
from edit_ray import EditWanPipeline
from edit_ray.engine.segment import SegmentEngine

SKIPPED = (0, 11, 17, 20)  # of 30, as in the table of github.com/Antlera/EDiT
SPEEDUPS = {11: 1.57, 17: 2.29, 20: 2.97}
STOCK = "diffusers, no cache"

On = Callable[[], AbstractContextManager[dict[str, Any]]]
Rows = Callable[["Bench", str], list["Row"]]


@dataclass(frozen=True)
class Row:
    """A pipeline with a cache or without; `on` turns it on and yields what the call takes beside."""

    name: str
    pipe: Any
    on: On
    skipped: int
    baseline: str
    ours: bool = True


class Bench:
    """Measures rows on one model."""

    def __init__(self, results: Results, task: Task, pipe: EditWanPipeline, device: str) -> None:
        self.results, self.task, self.pipe, self.device = results, task, pipe, device
        self.stock, self.given = stock_pipe(pipe), embeds(pipe)
        self._blocks = 0
        self._exact: dict[int, Tensor] = {}  # latents by how many steps were skipped

    def measure(self, row: Row, count_blocks: bool = True) -> None:
        """One call of a row's pipeline; its figures are those of all calls so far."""
        if not self.results.time_for(row.name):
            return
        counted = self._counted() if count_blocks else nullcontext()
        with self.results.row(row.name) as figures, row.on() as beside, counted:
            memory_peak(self.device, reset=True)
            synchronise(self.device)
            started = time.perf_counter()
            latents = generate(row.pipe, self.task, self.given, **beside)
            synchronise(self.device)
            each = [*figures.get("each", []), time.perf_counter() - started]
            peak = memory_peak(self.device)
            figures.update(ours=row.ours, skipped=row.skipped, seconds=median(each), times=len(each))
            if count_blocks:
                figures["blocks"] = self._blocks
            if peak is not None:
                figures["peak_GB"] = peak / 1e9
            figures.update(self._compared(row, figures), each=each)
            if row.ours:
                exact = self._exact.setdefault(row.skipped, latents.float().cpu())
                figures["deviation"] = float((latents.float().cpu() - exact).norm() / exact.norm())

    def _compared(self, row: Row, figures: dict[str, Any]) -> dict[str, float]:
        """The speedup, and what a skipped step costs in steps of the row's baseline, which was measured before."""
        full = figures["seconds"] if row.name == row.baseline else self.results.of(row.baseline).get("seconds")
        if full is None:
            return {}
        steps, took = self.task.num_inference_steps, figures["seconds"] / full
        found = {"speedup": 1 / took}
        if row.skipped:
            found["skipped_step"] = (took * steps - (steps - row.skipped)) / row.skipped
        return found

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the blocks that run in here by their self-attention, which a skipped one does not reach."""
        self._blocks = 0

        def count(_module: torch.nn.Module, _args: Any) -> None:
            self._blocks += 1

        handles = [block.attn1.register_forward_pre_hook(count) for block in self.pipe.transformer.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def warm_up(self, pipe: Any, **beside: Any) -> None:
        """A first call is slow."""
        generate(pipe, self.task, self.given, num_inference_steps=2, **beside)
        synchronise(self.device)


def our_rows(bench: Bench, mode: str) -> list[Row]:
    """Ours at each number of skipped steps."""

    def on(skipped: int) -> AbstractContextManager[dict[str, Any]]:
        steps = bench.task.num_inference_steps
        return our_cache(bench.pipe, "schedule", steps, mask=mask_of(steps, skipped)) if skipped else nullcontext({})

    names = {skipped: f"ours, {mode}, {skipped} skipped" if skipped else f"ours, {mode}" for skipped in skips(bench)}
    return [Row(name, bench.pipe, partial(on, skipped), skipped, names[0]) for skipped, name in names.items()]


def teacache_rows(bench: Bench, mode: str) -> list[Row]:
    """Ours with real weights: TeaCache at the thresholds of the table."""
    rows = [Row(f"ours, {mode}", bench.pipe, lambda: nullcontext({}), 0, f"ours, {mode}")]
    steps = bench.task.num_inference_steps
    for threshold in (0.1, 0.2, 0.3):
        options: dict[str, Any] = {"rel_l1_thresh": threshold, "wan_variant": "t2v-1.3B"}
        with our_cache(bench.pipe, "teacache", steps, **options):
            assert bench.pipe.cache is not None
            masks = bench.pipe.cache.plan() or {}
        skipped = sum(not compute for compute in next(iter(masks.values())))
        on = partial(our_cache, bench.pipe, "teacache", steps, **options)
        rows.append(Row(f"ours, {mode}, TeaCache {threshold}", bench.pipe, on, skipped, rows[0].name))
    return rows


def peer_rows(bench: Bench, skipped: int) -> list[Row]:
    """Every peer, skipping the same steps."""
    mask = mask_of(bench.task.num_inference_steps, skipped)

    def row(name: str, enable: Enable) -> Row:
        on = partial(enable, bench.stock, mask)
        return Row(f"{name}, {skipped} skipped", bench.stock, on, skipped, STOCK, ours=False)

    return [row(name, enable) for name, enable in PEERS.items()]


def skips(bench: Bench) -> list[int]:
    """0, 11, 17 and 20 of 30 steps, as shares of however many there are."""
    return [round(skipped / 30 * bench.task.num_inference_steps) for skipped in SKIPPED]


@contextmanager
def our_cache(pipe: EditWanPipeline, policy: str, steps: int, **options: Any) -> Iterator[dict[str, Any]]:
    """A policy of ours while it is entered."""
    pipe.enable_cache(policy, steps, **options)
    try:
        yield {}
    finally:
        pipe.disable_cache()


def never_skipping(steps: int) -> dict[str, dict[str, Any]]:
    """Every policy, with options at which it skips nothing."""
    return {
        "always": {},
        "dicache": {"rel_l1_thresh": 0.0},
        "dmd": {"cache_interval": 1},
        "easycache": {"thresh": 0.0},
        "fbcache": {"rel_l1_thresh": 0.0},
        "foca": {"cache_interval": 1},
        "lemica": {"skips": 0, "reuse_error": [[]] * steps},
        "magcache": {"threshold": 0.0, "mag_ratios": [1.0] * steps},
        "ranked": {"skips": 0, "skip_rank": list(range(steps))},
        "schedule": {"mask": [True] * steps},
        "seacache": {"threshold": 0.0},
        "spectrum": {"window_size": 1, "flex_window": 0},
        "taylorseer": {"cache_interval": 1},
        "teacache": {"rel_l1_thresh": 0.0, "wan_variant": "t2v-1.3B"},
        "warmstart_reuse": {"warm_steps": 0, "inner": "always"},
    }


def compare_latents(bench: Bench, steps: int) -> None:
    """Latents of few steps, bit for bit: diffusers, ours, ours with each policy, and the engine of the GPU actor."""
    name = "latents equal diffusers'"
    with bench.results.row(name) as figures:
        reference = generate(bench.stock, bench.task, bench.given, num_inference_steps=steps)
        found = {"no cache": generate(bench.pipe, bench.task, bench.given, num_inference_steps=steps)}
        for policy, options in never_skipping(steps).items():
            with our_cache(bench.pipe, policy, steps, **options):
                found[policy] = generate(bench.pipe, bench.task, bench.given, num_inference_steps=steps)
        sampling = bench.task.sampling.model_copy(update={"num_inference_steps": steps})
        engine = SegmentEngine(bench.pipe)
        engine_latents = engine.denoise(sampling, prompt=PROMPT, seed=SEED)
        equal = {of: torch.equal(latents, reference) for of, latents in found.items()}
        equal["engine"] = torch.equal(engine_latents, reference.float().cpu())
        differ = [of for of, same in equal.items() if not same]
        figures.update(steps=steps, compared=len(equal), equal=sum(equal.values()), differing=" ".join(differ) or None)
        bench.results.bar(name, sum(equal.values()) / len(equal), least=1.0)


def decode_rows(bench: Bench, mode: str) -> None:
    """The VAE on a segment's latents, through the streaming decoder of the actors."""
    with bench.results.row(f"VAE decode, {mode}") as figures:
        latents = generate(bench.pipe, bench.task, bench.given, num_inference_steps=1).cpu()
        engine, each = SegmentEngine(bench.pipe), []
        for _ in range(4):
            memory_peak(bench.device, reset=True)
            synchronise(bench.device)
            started = time.perf_counter()
            with decoding(bench.pipe, mode):
                engine.decode(None, latents.float())
            synchronise(bench.device)
            each.append(time.perf_counter() - started)
        peak = memory_peak(bench.device)
        figures.update(ours=True, seconds=median(each[1:]), times=3, first=each[0])
        if peak is not None:
            figures["peak_GB"] = peak / 1e9


def add_bars(results: Results, task: Task) -> None:
    """The table's own; of the full size alone."""
    for mode in ("exact", "fast"):
        for skipped, least in SPEEDUPS.items():
            what = f"speedup, {mode}, {skipped} of 30 skipped"
            results.bar(what, results.of(f"ours, {mode}, {skipped} skipped").get("speedup"), least=least)
    full = results.of("ours, fast").get("seconds")
    forwards = 2 * task.num_inference_steps
    results.bar("full forward, fast, ms (a share of the loop)", full and 1000 * full / forwards, most=120)
    decode = results.of("VAE decode, fast").get("seconds")
    results.bar("VAE decode, fast, ms", decode and 1000 * decode, most=500)


def measure_exact(bench: Bench, rows: Rows, repeats: int) -> None:
    """What the bars are about, then the peers at 17 of 30."""
    stock = Row(STOCK, bench.stock, lambda: nullcontext({}), 0, STOCK, False)
    our = rows(bench, "exact")
    for pipe in (bench.stock, bench.pipe):
        bench.warm_up(pipe)
    bench.measure(stock)
    for _ in range(repeats):
        for row in our:
            bench.measure(row)
    if not bench.results.content["task"]["real_weights"]:
        for row in peer_rows(bench, skips(bench)[2]):
            bench.measure(row)
    decode_rows(bench, "exact")


def measure_compiled(bench: Bench, rows: Rows, mode: str) -> None:
    """The same in the mode `fast`, or the first and the last of it with linear layers in 8 bits."""
    if not bench.results.time_for(f"ours, {mode}"):
        return
    use(bench.pipe, mode)
    with bench.results.row(f"{mode}: to compile") as figures:
        if bench.device == "cpu":
            raise LeftOut("a toy on a CPU is not worth compiling")
        started = time.perf_counter()
        bench.warm_up(bench.pipe)
        figures.update(ours=True, compile_s=time.perf_counter() - started, graphs=compiled_graphs())
    if bench.results.of(f"{mode}: to compile"):
        found, graphs = rows(bench, mode), compiled_graphs()
        for row in found if mode == "fast" else (found[0], found[-1]):
            bench.measure(row, count_blocks=False)
        bench.results.bar(f"compilations after the first loop, {mode}", compiled_graphs() - graphs, most=0)
        if mode == "fast":
            decode_rows(bench, mode)
    use(bench.pipe, "exact")


def main() -> None:
    """Measure, print, write."""
    args = arguments(
        __doc__ or "",
        seconds=170,
        model={"help": "a folder with real weights"},
        steps={"type": int},
        repeats={"type": int, "default": 2},
        equal_steps={"type": int, "default": 2, "help": "of the latents that are compared"},
        peers_at={"type": int, "nargs": "*", "default": [], "help": "numbers of skipped steps beside 17 for the peers"},
        modes={"nargs": "+", "choices": MODES, "default": MODES},
    )
    task = task_for(args.quick, num_inference_steps=args.steps or (10 if args.quick else None))
    told = task.told() | {"quick": args.quick, "real_weights": args.model is not None}
    results = Results(args, told, figure="seconds")
    if args.model is None:
        pipe = make_pipe(task, args.device)
    else:
        pipe = EditWanPipeline.from_pretrained(args.model, torch_dtype=task.dtype, device=args.device)
        pipe.set_progress_bar_config(disable=True)
    bench = Bench(results, task, pipe, args.device)
    rows = our_rows if args.model is None else teacache_rows
    if "exact" in args.modes:
        compare_latents(bench, args.equal_steps)
        measure_exact(bench, rows, args.repeats)
    for mode in args.modes:
        if mode != "exact":
            measure_compiled(bench, rows, mode)
    for skipped in args.peers_at:
        for row in peer_rows(bench, skipped):
            bench.measure(row)
    if not args.quick:
        add_bars(results, task)
    results.finish()


if __name__ == "__main__":
    main()
