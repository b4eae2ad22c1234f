"""One forward of Wan2.1-T2V-1.3B and one decode, ingredient by ingredient: what each gains, and what it changes.

    python benchmarks/fast_forward.py [--quick] [--seconds 165] --output FILE

On a GPU, with random weights made in place. A part that fails is recorded as its error and the next one goes on; what
no longer fits into `--seconds` is named as left out. `--quick` runs all of it at a toy size, on a CPU too.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.forward_bench import STEPS, Bench, Model, Row, deviation, kernels  # noqa: E402
from benchmarks.forward_pieces import blocks, limits, products  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from benchmarks.real_size import compiled_graphs  # noqa: E402
from edit_ray.cache import apply_cache_on_transformer  # noqa: E402
from edit_ray.engine import fast_block, fast_vae  # noqa: E402
from edit_ray.engine.decode import StreamingDecoder  # noqa: E402
from edit_ray.engine.fast_transformer import FastTransformer, compiled  # noqa: E402
from edit_ray.engine.fast_vae import fast_decoder  # noqa: E402
from edit_ray.testing import fill_random  # noqa: E402


def mask(skipped: int, steps: int) -> list[bool]:
    """Steps that compute, the first one among them, spread evenly."""
    computed = steps - skipped
    return [step * computed // steps != (step - 1) * computed // steps or step == 0 for step in range(steps)]


def exact(bench: Bench, model: Model) -> None:
    """diffusers' own forward, and ours in the mode `exact`."""
    bench.part("forward, diffusers eager", lambda: {"ms": bench.ms(model.forward)})

    def hoisted() -> Row:
        with model.known():
            return {"ms": bench.ms(model.forward)}

    bench.part("forward, exact", hoisted)

    def equal() -> Row:
        before = model.forward()
        with model.known():
            return {"equal": torch.equal(before, model.forward())}

    bench.part("forward, exact, bits", equal)
    bench.part("forward, skipped, exact", lambda: skipped_forward(bench, model))


def skipped_forward(bench: Bench, model: Model, fast: FastTransformer | None = None) -> Row:
    count = 200
    cache = apply_cache_on_transformer(model.transformer, "schedule", count, mask=[True] + [False] * (count - 1))
    step = iter(range(1, count))

    def skipped() -> Tensor:
        with model.transformer.cache_context("cond", step_index=next(step), num_inference_steps=count):
            return model.forward()

    with model.known(), nullcontext() if fast is None else fast.installed():
        with model.transformer.cache_context("cond", step_index=0, num_inference_steps=count):
            model.forward()
        found: Row = {"ms": bench.ms(skipped, 50, 10), "device_ms": bench.device_ms(skipped, 30)}
        if bench.device.type == "cuda":
            bench.sync()
            started = time.perf_counter()
            for _ in range(30):
                skipped()
            found["launch_ms"] = (time.perf_counter() - started) * 1000 / 30
            found["kernels"] = kernels(skipped, 15)
    cache.remove()
    return found


def loops(bench: Bench, model: Model) -> None:
    """Whole loops: times, speedups, deviation."""
    steps = 4 if bench.quick else STEPS
    kept: dict[str, Tensor] = {}

    def timed(name: str, skipped: int = 0) -> Row:
        cache = None
        if skipped:
            cache = model.pipe.enable_cache("schedule", steps, mask=mask(skipped, steps))
        try:
            bench.sync()
            started = time.perf_counter()
            kept[name] = model.loop(steps)
            bench.sync()
            found: Row = {"seconds": time.perf_counter() - started, "skipped": skipped}
        finally:
            if cache is not None:
                model.pipe.disable_cache()
        if "exact" in kept and name != "exact" and not skipped:
            found["deviation"] = deviation(kept[name], kept["exact"])
        found["ms_per_forward"] = 500 * found["seconds"] / (steps - skipped)
        found["finite"] = bool(kept[name].isfinite().all())
        return found

    twenty = steps * 2 // 3
    bench.part("loop, exact, first", lambda: model.loop(2) is not None)
    bench.part("loop, exact", lambda: timed("exact"), 13)
    for skipped in (20,) if not bench.quick else (2,):
        bench.part(f"loop, exact, {skipped} skipped", partial(timed, f"skip {skipped}", skipped), 8)
    bench.part("loop, exact, watched", lambda: {"waits": synchronisations(model, min(steps, 6))})
    if bench.device.type == "cpu":
        return
    for fp8 in (False, True):
        name = "fast, fp8" if fp8 else "fast"
        model.pipe.precompute.mode, model.pipe.precompute.fp8 = "fast", fp8
        bench.part(f"loop, {name}, first", lambda: model.loop(2) is not None, 10)
        graphs = compiled_graphs()
        bench.part(f"loop, {name}", partial(timed, name), 9)
        bench.part(f"loop, {name}, {twenty} skipped", partial(timed, f"{name} skip", twenty), 4)
        bench.part(f"loop, {name}, compilations after the first", partial(_graphs_since, graphs))
    model.pipe.precompute.mode, model.pipe.precompute.fp8 = "exact", False


def _graphs_since(before: int) -> Row:
    return {"count": compiled_graphs() - before}


def synchronisations(model: Model, steps: int) -> list[str] | None:
    """Where a loop waits for the device."""
    if model.bench.device.type != "cuda":
        return None

    def watch(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("default" if step == steps - 1 else "warn")
        return {}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model.loop(steps, callback_on_step_end=watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch's notice that this mode is a prototype, once in a process, has "synchronizing" in it too.
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]


def fast_forwards(bench: Bench, model: Model) -> None:
    """The whole forward in the mode `fast`."""
    wanted = model.forward()

    def measured(fp8: bool) -> Row:
        fast = FastTransformer(model.transformer, fp8=fp8)
        with model.known(), fast.installed():
            got = model.forward()
            found: Row = {"ms": bench.ms(model.forward), "deviation": deviation(got, wanted)}
            found["device_ms"] = bench.device_ms(model.forward, 2)
            if bench.device.type == "cuda":
                found["kernels"] = kernels(model.forward, 25)
        return found

    if bench.device.type == "cuda":
        bench.part("forward, fast", lambda: measured(False), 15)
        bench.part("forward, fast, fp8", lambda: measured(True), 15)
        bench.part("forward, skipped, fast", lambda: skipped_forward(bench, model, FastTransformer(model.transformer)))


def decoding(bench: Bench, _model: Model) -> None:
    """The VAE's decoder on one segment."""
    config: dict[str, Any] = {"base_dim": 8, "num_res_blocks": 1} if bench.quick else {}
    with torch.device(bench.device):
        vae = AutoencoderKLWan(**config).eval()
    fill_random(vae)
    shape = (1, 16, 3, 8, 8) if bench.quick else (1, 16, 9, 60, 104)
    latents = torch.randn(shape, generator=torch.Generator(bench.device).manual_seed(1), device=bench.device)
    kept: dict[str, Tensor] = {}

    def decode(
        name: str, dtype: torch.dtype, *, fast: bool = False, search: bool = False, compiled: bool = True
    ) -> Row:
        model = vae.to(dtype)
        torch.backends.cudnn.benchmark = search
        run = None if bench.device.type == "cuda" else fast_vae.PLAIN
        try:
            with fast_decoder(model, run) if fast else nullcontext():

                def work() -> Tensor:
                    return StreamingDecoder(model).decode(latents)

                kept[name] = work()
                started = time.perf_counter()
                work()
                bench.sync()
                found: Row = {"second_s": time.perf_counter() - started, "ms": bench.ms(work, 3, 1)}
                found["peak_gb"] = bench.peak_gb(work)
                if bench.device.type == "cuda" and name != "fp32":
                    found["kernels"] = kernels(work, 20)
        finally:
            torch.backends.cudnn.benchmark = False
        return found | {"deviation": deviation(kept[name], kept["fp32"])}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench.part("decode, fp32", lambda: decode("fp32", torch.float32), 6)
        bench.part("decode, bf16", lambda: decode("bf16", torch.bfloat16), 5)
        bench.part("decode, bf16, fast", lambda: decode("fast", torch.bfloat16, fast=True), 15)
        wide, fast_vae.WIDE = fast_vae.WIDE, 1
        bench.part("decode, bf16, fast, not widened", lambda: decode("narrow", torch.bfloat16, fast=True), 10)
        fast_vae.WIDE = wide
        bench.part("decode, bf16, fast, searched", lambda: decode("both", torch.bfloat16, fast=True, search=True), 10)


def searched(bench: Bench, model: Model) -> None:
    """The forward in the mode `fast`, with what inductor can be told to try."""
    if bench.device.type != "cuda":
        return
    told: dict[str, dict[str, Any]] = {
        "rows held": {"triton.multi_kernel": 2},
        "rows held or not": {"triton.multi_kernel": 1},
        "pointwise tried": {"max_autotune_pointwise": True},
        "coordinates tried": {"coordinate_descent_tuning": True},
    }
    wanted = model.forward()

    def measured(options: dict[str, Any]) -> Row:
        torch._dynamo.reset()
        block = torch.compile(fast_block.block, dynamic=False, options=options)
        fast = FastTransformer(model.transformer, functions=compiled()._replace(block=block))
        with model.known(), fast.installed():
            started = time.perf_counter()
            got = model.forward()
            bench.sync()
            found: Row = {"first_s": time.perf_counter() - started, "ms": bench.ms(model.forward, 5, 3)}
            found |= {"deviation": deviation(got, wanted), "kernels": kernels(model.forward, 14)}
        return found

    for name, options in told.items():
        bench.part(f"forward, fast, {name}", partial(measured, options), 15)


PARTS: dict[str, Callable[[Bench, Model], None]] = {
    "exact": exact,
    "forwards": fast_forwards,
    "loops": loops,
    "decoding": decoding,
    "searched": searched,
    "limits": limits,
    "products": products,
    "blocks": blocks,
}


@torch.no_grad()
def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy size")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=165, help="when no further part is begun")
    parser.add_argument("--output", type=Path, help="where to write the figures (JSON)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        parser.error("there is no GPU here: only --quick runs")
    bench = Bench(device, args.quick, time.monotonic() + args.seconds)

    def write() -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            written = {"provenance": provenance(device.type), "rows": bench.rows}
            args.output.write_text(json.dumps(written, indent=1) + "\n")

    model = Model(bench)
    for name in args.parts.split(","):
        PARTS[name](bench, model)
        write()


if __name__ == "__main__":
    main()
