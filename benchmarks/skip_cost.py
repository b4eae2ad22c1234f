"""What a skipped forward costs beside a full one, ours and the peers'.

    python benchmarks/skip_cost.py --output benchmarks/results/skip_cost      on a GPU
    python benchmarks/skip_cost.py --quick                                    a toy on a CPU
    python benchmarks/skip_cost.py --layouts i2v-14B i2v-A14B vace-14B        of image to video and VACE, ours alone

In the denoising loop of each pipeline, with the same steps skipped by all but our forecasts, and but easycache and
lemica, which compute the last step too: a forward's time is that between two events on the device, from before its
`cache_context` until after it (on a CPU, by the clock). The loop is ahead of the device where it can be. Medians, of
both branches.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch

from benchmarks.gpu_results import LeftOut, Results, arguments
from benchmarks.peers import PEERS
from benchmarks.real_size import (
    MODES,
    Task,
    conditions,
    embeds,
    generate,
    make_pipe,
    stock_pipe,
    synchronise,
    task_for,
    use,
)
from benchmarks.wan_table import our_cache
from edit_ray.testing import VARIANTS

COMPUTED = 4  # first steps that compute
LAYOUT_STEPS = 8
# By policy: options with which it sums five or six stored residuals in most of its skips.
FORECASTS: dict[str, dict[str, Any]] = {
    "spectrum": {"warmup_steps": COMPUTED, "window_size": 2.0, "flex_window": 0.0, "history_size": 5},
    "foca": {"cache_interval": 2, "disable_cache_before_step": COMPUTED, "history_size": 5},
    "dmd": {"cache_interval": 2, "disable_cache_before_step": COMPUTED, "history_size": 5},
}


def skipping_the_rest(steps: int) -> dict[str, dict[str, Any]]:
    """By policy: options with which a loop skips all steps between its first ones and its last one."""
    skips = steps - COMPUTED - 1
    errors = [[0.0] * skips if step == COMPUTED - 1 else [] for step in range(steps)]
    return {
        "easycache": {"thresh": 1e9, "ret_steps": COMPUTED},
        "lemica": {"reuse_error": errors, "skips": skips},
    }


class Moments:
    """Times of the forwards of one transformer, in milliseconds, in their order."""

    def __init__(self, transformer: Any, device: str) -> None:
        self._transformer, self._cuda = transformer, device == "cuda"
        self._moments: list[tuple[Any, Any]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Every forward in it is timed."""
        inner = self._transformer.cache_context

        @contextmanager
        def cache_context(name: str, **where: Any) -> Iterator[None]:
            before = self._now()
            with inner(name, **where):
                yield
            self._moments.append((before, self._now()))

        self._transformer.__dict__["cache_context"] = cache_context
        try:
            yield
        finally:
            del self._transformer.__dict__["cache_context"]

    def taken(self) -> list[float]:
        """Milliseconds of each, and forget them."""
        moments, self._moments = self._moments, []
        if not self._cuda:
            return [1000 * (after - before) for before, after in moments]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in moments]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measure(
    results: Results,
    name: str,
    run: Callable[..., Any],
    on: Callable[[], AbstractContextManager[dict[str, Any]]],
    moments: Moments,
    ours: bool,
    mask: Sequence[bool],
) -> None:
    """A row: one loop of `run`, whose steps compute where `mask` says so and are skipped elsewhere."""
    if not results.time_for(name):
        return
    with results.row(name) as figures:
        with on() as beside, moments.watched():
            run(**beside)
        taken = moments.taken()
        full = [taken[at] for at in range(2, len(taken)) if mask[at // 2]]  # the first step is slow
        skipped = [taken[at] for at in range(len(taken)) if not mask[at // 2]]
        figures.update(
            ours=ours,
            full_ms=median(full),
            skipped_ms=median(skipped),
            share=median(skipped) / median(full),
            least_ms=min(skipped),
            forwards=len(skipped),
        )


def measure_all(results: Results, task: Task, device: str, modes: Sequence[str]) -> None:
    """Ours in the modes, and the peers."""
    pipe = make_pipe(task, device)
    stock, given = stock_pipe(pipe), embeds(pipe)
    mask = [step < COMPUTED for step in range(task.num_inference_steps)]

    def loop_of(of: Any) -> Callable[..., Any]:
        return lambda **beside: generate(of, task, given, **beside)

    def ours(mode: str) -> None:
        generate(pipe, task, given, num_inference_steps=2)
        synchronise(device)

        def on() -> AbstractContextManager[dict[str, Any]]:
            return our_cache(pipe, "schedule", task.num_inference_steps, mask=mask)

        for _ in range(2):  # the second one stands
            measure(results, f"ours, {mode}", loop_of(pipe), on, Moments(pipe.transformer, device), True, mask)

    ours("exact")
    steps = task.num_inference_steps
    rest = [compute or step == steps - 1 for step, compute in enumerate(mask)]
    for policy, options in {**FORECASTS, **skipping_the_rest(steps)}.items():

        def forecast(policy: str = policy, options: Any = options) -> AbstractContextManager[dict[str, Any]]:
            return our_cache(pipe, policy, steps, **options)

        planned = mask_of(pipe, policy, steps, options) if policy in FORECASTS else rest
        measure(results, policy, loop_of(pipe), forecast, Moments(pipe.transformer, device), True, planned)
    for name, enable in PEERS.items():

        def on(enable: Any = enable) -> AbstractContextManager[dict[str, Any]]:
            return enable(stock, mask)  # type: ignore[no-any-return]

        measure(results, name, loop_of(stock), on, Moments(stock.transformer, device), False, mask)
    full_loop(results, loop_of(pipe), Moments(pipe.transformer, device), "exact")
    for mode in modes:
        with results.row(f"{mode}: to compile") as figures:
            if device == "cpu":
                raise LeftOut("a toy on a CPU is not worth compiling")
            started = time.perf_counter()
            use(pipe, mode)
            generate(pipe, task, given, num_inference_steps=2)
            figures.update(ours=True, compile_s=time.perf_counter() - started)
        if results.of(f"{mode}: to compile"):
            ours(mode)
            full_loop(results, loop_of(pipe), Moments(pipe.transformer, device), mode)


def measure_layouts(results: Results, layouts: Sequence[str], quick: bool, device: str) -> None:
    """Ours, exact, of models with other conditions than a text; of two experts one."""
    for name in layouts:
        task, given_to = task_for(quick, num_inference_steps=LAYOUT_STEPS), VARIANTS[name].transformer
        if quick:  # the toy's sizes
            kinds: dict[str, Any] = {"vace_layers": [0, 2], "vace_in_channels": 72} if "vace_layers" in given_to else {}
            kinds |= {"in_channels": 12} if given_to.get("in_channels") == 36 else {}
            kinds |= {"image_dim": 8, "added_kv_proj_dim": 24} if "image_dim" in given_to else {}
            task = replace(task, variant=replace(task.variant, transformer={**task.variant.transformer, **kinds}))
        else:
            variant = replace(VARIANTS[name], boundary_ratio=None)
            task = replace(task, model=f"Wan {name}, random weights", variant=variant)
        if not results.time_for(name):
            continue
        pipe = make_pipe(task, device)
        given = embeds(pipe) | conditions(task, device)
        generate(pipe, task, given, num_inference_steps=2)
        synchronise(device)
        mask = [step < COMPUTED for step in range(task.num_inference_steps)]

        def run(pipe: Any = pipe, task: Task = task, given: Any = given, **beside: Any) -> Any:
            return generate(pipe, task, given, **beside)

        def on(pipe: Any = pipe, mask: Any = mask) -> AbstractContextManager[dict[str, Any]]:
            return our_cache(pipe, "schedule", len(mask), mask=mask)

        measure(results, name, run, on, Moments(pipe.transformer, device), True, mask)
        if not quick:
            results.bar(f"skipped / full forward, {name}", results.of(name).get("share"), most=0.005)
        del pipe, run, on
        if device == "cuda":
            torch.cuda.empty_cache()


def mask_of(pipe: Any, policy: str, steps: int, options: dict[str, Any]) -> list[bool]:
    """The known mask of a policy on a pipeline of one expert."""
    with our_cache(pipe, policy, steps, **options):
        return list(pipe.cache.plan()["transformer", "cond", 0])


def full_loop(results: Results, run: Callable[..., Any], moments: Moments, mode: str) -> None:
    """Forwards without any cache."""
    with results.row(f"no cache, {mode}") as figures:
        with moments.watched():
            run(num_inference_steps=5)
        figures.update(ours=True, full_ms=median(moments.taken()[2:]))


def main() -> None:
    """Measure, print, write."""
    args = arguments(
        __doc__ or "",
        seconds=45,
        modes={"nargs": "*", "choices": MODES[1:], "default": [], "help": "beside exact"},
        layouts={"nargs": "*", "choices": list(VARIANTS), "default": [], "help": "these alone, without peers"},
    )
    task = task_for(args.quick)
    told = task.told() | {"quick": args.quick, "computed_steps": COMPUTED}
    if args.layouts:
        told |= {"model": "Layouts of Wan, random weights", "num_inference_steps": LAYOUT_STEPS}
    results = Results(args, told, figure="skipped_ms")
    if args.layouts:
        measure_layouts(results, args.layouts, args.quick, args.device)
    else:
        measure_all(results, task, args.device, args.modes)
    if not args.quick and not args.layouts:
        results.bar("skipped / full forward, exact", results.of("ours, exact").get("share"), most=0.004)
        full = results.of("no cache, fast").get("full_ms")
        results.bar("full forward, fast, ms", full, most=120)
    results.finish()


if __name__ == "__main__":
    main()
