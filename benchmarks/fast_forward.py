"""One forward of Wan2.1-T2V-1.3B and one decode, ingredient by ingredient: what each gains, and what it changes.

    python benchmarks/fast_forward.py [--quick] [--seconds 165] --output FILE

On a GPU, with random weights made in place. A part that fails is recorded as its error and the next one goes on; what
no longer fits into `--seconds` is named as left out. `--quick` runs all of it at a toy size, on a CPU too.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.provenance import provenance  # noqa: E402
from edit_ray import EditWanPipeline  # noqa: E402
from edit_ray.cache import apply_cache_on_transformer  # noqa: E402
from edit_ray.engine import fast_block, fast_vae  # noqa: E402
from edit_ray.engine.decode import StreamingDecoder  # noqa: E402
from edit_ray.engine.fast import FastTransformer, Functions, compiled  # noqa: E402
from edit_ray.engine.fast_vae import fast_decoder  # noqa: E402
from edit_ray.engine.hoist import Hoisted  # noqa: E402
from edit_ray.testing import Variant, fill_random, random_transformer  # noqa: E402

QUICK = Variant(
    {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 2, "text_dim": 64},
    flow_shift=3.0,
)
STEPS = 30
Row = dict[str, Any]


@dataclass
class Bench:
    """The clock, what was measured so far, and the model."""

    device: torch.device
    quick: bool
    ends: float
    rows: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str, work: Callable[[], Any], needs: float = 1.0) -> Any:
        """Record what `work` returns under `name`, or why it does not."""
        if time.monotonic() + needs > self.ends:
            self.rows[name] = {"left_out": "no time was left"}
            return None
        started = time.monotonic()
        try:
            self.rows[name] = work()
        except Exception as error:
            self.rows[name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        print(f"{time.monotonic() - started:6.1f} s  {name}: {json.dumps(self.rows[name])[:300]}", flush=True)
        return self.rows[name]

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def ms(self, work: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
        """Median milliseconds of a call, waited for."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeats):
            self.sync()
            started = time.perf_counter()
            work()
            self.sync()
            times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    def device_ms(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Milliseconds of a call on the device alone: the calls are queued while it sleeps."""
        if self.device.type != "cuda":
            return self.ms(work, 3, 1)
        work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000_000)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / repeats

    def peak_gb(self, work: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            work()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e9


def deviation(got: Tensor, wanted: Tensor) -> Row:
    """How far a result is from the exact one, in absolute terms and as PSNR over its range."""
    error = (got.double() - wanted.double()).abs()
    span = float(wanted.double().amax() - wanted.double().amin())
    mse = float((error**2).mean())
    psnr = float("inf") if mse == 0 else 10 * torch.log10(torch.tensor(span**2 / mse)).item()
    return {"max": float(error.max()), "mean": float(error.mean()), "psnr_db": psnr if mse else None, "span": span}


class Model:
    """A transformer, its inputs, and a pipeline around it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, device = bench, bench.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        variant: Any = QUICK if bench.quick else "t2v-1.3B"
        self.transformer = random_transformer(variant, device=device, dtype=self.dtype)
        shape = (1, 16, 3, 16, 16) if bench.quick else (1, 16, 9, 60, 104)
        config = self.transformer.config
        generator = torch.Generator(device).manual_seed(0)
        self.latents = torch.randn(shape, generator=generator, device=device)
        text = (1, 512, config.text_dim)
        self.texts = [torch.randn(text, generator=generator, device=device).to(self.dtype) for _ in range(2)]
        self.timestep = torch.tensor([500], device=device)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        self.pipe = EditWanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=self.transformer
        )
        self.pipe.set_progress_bar_config(disable=True)

    def forward(self) -> Tensor:
        output: Tensor = self.transformer(self.latents.to(self.dtype), self.timestep, self.texts[0], return_dict=False)[
            0
        ]
        return output

    def loop(self, steps: int = STEPS, **call: Any) -> Tensor:
        """The latents of a whole guided loop."""
        _, _, frames, height, width = self.latents.shape
        output: tuple[Tensor] = self.pipe(
            prompt_embeds=self.texts[0],
            negative_prompt_embeds=self.texts[1],
            height=8 * height,
            width=8 * width,
            num_frames=4 * (frames - 1) + 1,
            num_inference_steps=steps,
            latents=self.latents,
            output_type="latent",
            return_dict=False,
            **call,
        )
        return output[0]

    @contextmanager
    def known(self) -> Iterator[None]:
        """As inside a loop: what is constant is known."""
        hoisted = Hoisted(self.transformer)
        with hoisted.installed():
            hoisted.embed_times([self.timestep], [500.0], self.texts[0])
            yield


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


def kernels(work: Callable[[], Any], rows: int) -> list[Row]:
    """What the device did in one call, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    work()
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    longest = sorted(on_device, key=lambda event: -event.self_device_time_total)[:rows]
    return [{"name": e.key[:110], "ms": e.self_device_time_total / 1000, "calls": e.count} for e in longest]


def products(bench: Bench, model: Model) -> None:
    """The block's matrix products and attention, each alone."""
    device, dtype, config = bench.device, model.dtype, model.transformer.config
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    width, ffn = heads * head_dim, config.ffn_dim
    _, _, frames, height, columns = model.latents.shape
    tokens = frames * height * columns // 4
    rows = torch.randn(tokens, width, device=device).to(dtype)
    wide = torch.randn(tokens, ffn, device=device).to(dtype)

    def weights(out: int, into: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(out, into, device=device) / into**0.5).to(dtype), torch.zeros(out, device=device).to(dtype)

    shapes = {"d_d": (rows, width, width), "d_3d": (rows, 3 * width, width)}
    shapes |= {"d_f": (rows, ffn, width), "f_d": (wide, width, ffn)}

    def of_products() -> Row:
        found: Row = {}
        for name, (x, out, into) in shapes.items():
            weight, bias = weights(out, into)
            found[name] = bench.device_ms(partial(F.linear, x, weight, bias))
            if device.type == "cuda":
                found |= _eight_bits(bench, name, x, weight)
        weight, bias = weights(ffn, width)
        found["gelu"] = bench.device_ms(partial(F.gelu, wide, approximate="tanh"))
        found["d_f with gelu"] = bench.device_ms(lambda: torch._addmm_activation(bias, rows, weight.t(), use_gelu=True))
        return found

    bench.part("products", of_products)

    def of_attention() -> Row:
        found = {}
        fused = torch.randn(1, tokens, 3 * width, device=device).to(dtype)
        views = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=-1)]
        layouts = {"views": views, "contiguous": [part.contiguous() for part in views]}
        layouts["tokens_first"] = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in views]
        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        for backend, which in backends.items() if device.type == "cuda" else ():
            for layout, qkv in layouts.items():
                with sdpa_kernel(which):
                    found[f"{backend}, {layout}"] = bench.device_ms(partial(F.scaled_dot_product_attention, *qkv), 5)
            key, value = (torch.randn(1, heads, 512, head_dim, device=device).to(dtype) for _ in range(2))
            with sdpa_kernel(which):
                found[f"{backend}, text"] = bench.device_ms(
                    partial(F.scaled_dot_product_attention, views[0], key, value), 20
                )
        found["default, views"] = bench.device_ms(partial(F.scaled_dot_product_attention, *views), 5)
        return found

    bench.part("attention", of_attention)


def _eight_bits(bench: Bench, name: str, x: Tensor, weight: Tensor) -> Row:
    layer = fast_block.quantise(fast_block.Layer(weight, None))
    assert layer.scale is not None
    x8, one = x.to(fast_block.FP8), torch.ones((), device=x.device)
    ones = torch.ones(len(x), 1, device=x.device)
    scaled = partial(torch._scaled_mm, x8, layer.weight.t(), out_dtype=x.dtype, use_fast_accum=True)
    return {
        f"{name} fp8 by row": bench.device_ms(partial(scaled, scale_a=ones, scale_b=layer.scale)),
        f"{name} fp8 by tensor": bench.device_ms(partial(scaled, scale_a=one, scale_b=one)),
    }


def blocks(bench: Bench, model: Model) -> None:
    """One block, in several ways."""
    block = model.transformer.blocks[0]
    seen: dict[str, Any] = {}

    def watch(_module: Any, args: tuple[Any, ...]) -> None:
        seen["args"] = args

    handle = block.register_forward_pre_hook(watch)
    model.forward()
    handle.remove()
    args = seen["args"]
    wanted = block(*args)
    bench.part("block, diffusers eager", lambda: {"ms": bench.device_ms(lambda: block(*args), 5)})

    def ours(functions: Functions, fp8: bool = False) -> Row:
        fast = FastTransformer(model.transformer, fp8=fp8, functions=functions)
        with fast.installed():
            got = block(*args)
            found: Row = {"ms": bench.device_ms(lambda: block(*args), 10), "deviation": deviation(got, wanted)}
            if bench.device.type == "cuda":
                found["kernels"] = kernels(lambda: block(*args), 25)
        return found

    bench.part("block, ours eager", lambda: ours(Functions()))
    if bench.device.type == "cuda" or not bench.quick:
        bench.part("block, ours compiled", lambda: ours(compiled()), 20)
        bench.part("block, ours compiled, fp8", lambda: ours(compiled(), fp8=True), 20)


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
    for name in ("first watched", "watched again"):  # the first that is watched waits once more
        bench.part(f"loop, exact, {name}", lambda: {"waits": synchronisations(model, min(steps, 6))})
    if bench.device.type == "cpu":
        return
    for fp8 in (False, True):
        name = "fast, fp8" if fp8 else "fast"
        model.pipe.ahead.mode, model.pipe.ahead.fp8 = "fast", fp8
        bench.part(f"loop, {name}, first", lambda: model.loop(2) is not None, 10)
        graphs = _graphs()
        bench.part(f"loop, {name}", partial(timed, name), 9)
        bench.part(f"loop, {name}, {twenty} skipped", partial(timed, f"{name} skip", twenty), 4)
        bench.part(f"loop, {name}, compilations after the first", partial(_graphs_since, graphs))
    model.pipe.ahead.mode, model.pipe.ahead.fp8 = "exact", False


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _graphs_since(before: int) -> Row:
    return {"count": _graphs() - before}


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
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
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
