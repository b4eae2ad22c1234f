"""A clock, a place for figures, and one transformer with inputs: what `fast_forward.py` measures with."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from edit_ray import EditWanPipeline
from edit_ray.engine.precompute import Conditions
from edit_ray.testing import Variant, random_transformer

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
        hoisted = Conditions(self.transformer)
        with hoisted.installed():
            hoisted.embed_times([self.timestep], [500.0], self.texts[0])
            yield


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
