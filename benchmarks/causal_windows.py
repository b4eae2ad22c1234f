"""What it costs if a causal model's window is larger than the GPU, and to park one while another stream computes.

    python benchmarks/causal_windows.py --output benchmarks/results/causal_windows      on a GPU, within five minutes
    python benchmarks/causal_windows.py --quick --device cpu                            a toy

causal-14B with random weights, 480x832, a window of 12 latents, without decoding, in both modes: all of the window on
the device, and half of its layers' K/V in host memory, with the device's memory capped so that the whole window runs
out of it. A row's time is that of the median chunk with a full window; latents are compared.

A window of causal-1.3B is parked in host memory and taken back. The rate is that of its K/V, beside copies of as many
bytes in one piece. A recache is the time by which a chunk takes longer if the K/V of the chunks before it is computed
again.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from torch import Tensor

from benchmarks.causal import CHUNK, WINDOW, measure, pipeline, task_of
from benchmarks.gpu_results import Results, arguments
from benchmarks.real_size import Task, synchronise
from edit_ray import EditCausalWanPipeline
from edit_ray.cache.device_slots import AHEAD, HostMemory
from edit_ray.cache.kv_rings import KVLayout
from edit_ray.engine.causal_stream import CausalStream, VideoChunk

LEAST_RATE, MOST_SLOWER = 0.85, 1.15
PARKED = "causal-1.3B, a window parked and taken back"


def main() -> None:
    """Measure each row, compare, and write the results."""
    chunks: dict[str, Any] = {"type": int, "default": 6, "help": "with a full window, in each row"}
    args = arguments(__doc__ or "", seconds=240, chunks=chunks)
    task = task_of(args.quick, "causal-14B")
    results = Results(args, {**task.told(), "window": WINDOW, "chunk_size": CHUNK}, figure="chunk_s")
    parking(results, task_of(args.quick, "causal-1.3B"), args.device)
    larger_window(results, task, 2 if args.quick else args.chunks, args.device)
    results.finish()


def parking(results: Results, task: Task, device: str) -> None:
    """The row of a full window that is parked and taken back, and its bars."""
    pipe, text = pipeline(task, device)
    with results.row(PARKED) as figures:
        stream = pipe.stream(height=task.height, width=task.width, prompt_embeds=text, decode=False)
        for _ in range(WINDOW // CHUNK):
            next(stream)
        size = kv_bytes(stream.kv.layout)
        figures["kv_gb"] = size / 1e9
        figures["first_park_s"] = seconds(stream.kv.park, device)  # with the allocation of host memory
        stream.kv.unpark()
        times = [(seconds(stream.kv.park, device), seconds(stream.kv.unpark, device)) for _ in range(7)]
        for name, each in zip(("park", "unpark"), zip(*times, strict=True), strict=True):
            figures[f"{name}_s"], figures[f"{name}_gb_s"] = median(each), size / median(each) / 1e9
        chunk = median(seconds(partial(next, stream), device) for _ in range(3))
        again = []
        for _ in range(3):
            stream.send(prompt_embeds=text, switch="recache")
            again.append(seconds(partial(next, stream), device) - chunk)
        figures["recache_s"] = median(again)
        figures["recache_by_parking"] = median(again) / (figures["park_s"] + figures["unpark_s"])
        stream.close()
        figures["copied_out_gb_s"], figures["copied_in_gb_s"] = copy_rates(size, device)
    row = results.of(PARKED)
    for name, copied in (("park", "copied_out_gb_s"), ("unpark", "copied_in_gb_s")) if row else ():
        share = row[f"{name}_gb_s"] / row[copied]
        results.bar(f"{name}: its rate ÷ that of a copy in one piece", share, least=LEAST_RATE)


def larger_window(results: Results, task: Task, chunks: int, device: str) -> None:
    """The rows of a window on the device, and of the same with half of the layers' K/V in host memory, under a cap."""
    pipe, text = pipeline(task, device)
    call: dict[str, Any] = {"height": task.height, "width": task.width, "prompt_embeds": text, "decode": False}
    for mode in ("exact", "fast") if device == "cuda" else ("exact",):
        pipe.precompute.mode = "fast" if mode == "fast" else "exact"
        whole, half = f"{task.model}, {mode}, window on the device", f"{task.model}, {mode}, half of it in host memory"
        if not results.time_for(half):
            return
        made: dict[str, list[Tensor]] = {whole: [], half: []}
        with results.row(whole) as figures:
            layout = stream_row(figures, pipe, call, made[whole], chunks, device)
        if not results.of(whole):
            continue
        each, buffers = layout.ring_bytes + layout.rotated_bytes, (AHEAD + 1) * layout.ring_bytes + layout.rotated_bytes
        limit = buffers + layout.num_layers // 2 * each
        spared = layout.num_layers * each - limit
        with capped(device, results.of(whole).get("peak_gb", 0.0) * 1e9 - spared / 2), results.row(half) as figures:
            figures["whole_runs_out"] = runs_out(pipe, call)
            stream_row(figures, pipe, call | {"kv_device_bytes": limit}, made[half], chunks, device)
        equal = len(made[whole]) == len(made[half]) and all(map(torch.equal, made[whole], made[half]))
        results.note(f"{mode}: latents are {'equal' if equal else 'NOT equal'} to those of the window on the device.")
        resident, bounded = results.of(whole).get("chunk_s"), results.of(half).get("chunk_s")
        if resident and bounded:
            results.bar(f"{mode}: half in host memory ÷ on the device, a chunk", bounded / resident, most=MOST_SLOWER)


def stream_row(
    figures: dict[str, Any],
    pipe: EditCausalWanPipeline,
    call: dict[str, Any],
    made: list[Tensor],
    chunks: int,
    device: str,
) -> KVLayout:
    """Measure a second stream of this call, whose latents are put into `made`; returns the layout of its K/V."""

    def watched(stream: CausalStream) -> Iterator[VideoChunk]:
        for chunk in stream:
            made.append(chunk.latents.cpu())
            yield chunk

    warm = pipe.stream(**call)
    for _ in range(WINDOW // CHUNK + 1):
        next(warm)
    warm.close()
    stream = pipe.stream(**call, generator=torch.Generator().manual_seed(0))
    layout, figures["kv_on_device_gb"] = stream.kv.layout, stream.kv.device_bytes / 1e9
    figures["kv_gb"] = kv_bytes(layout) / 1e9
    measure(figures, watched(stream), chunks, device)
    figures["loaded_gb"] = stream.kv.rings.loaded_bytes / len(made) / 1e9  # in a chunk
    stream.close()
    return layout


@contextmanager
def capped(device: str, most_bytes: float) -> Iterator[None]:
    """Inside, torch may allocate so many bytes of a GPU's memory."""
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(most_bytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def runs_out(pipe: EditCausalWanPipeline, call: dict[str, Any]) -> bool:
    """Whether a chunk of this call runs out of the device's memory."""
    try:
        next(pipe.stream(**call))
    except torch.OutOfMemoryError:
        return True
    return False


def kv_bytes(layout: KVLayout) -> int:
    """Bytes of a full window's keys and values, without the rotated keys."""
    return layout.ring_bytes * layout.num_layers


def copy_rates(size: int, device: str) -> tuple[float, float]:
    """GB/s of a copy of `size` bytes in one piece from the device to page-locked memory, and back."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    memory = HostMemory(size, there.device)
    rates = []
    for target, source in ((memory.bytes, there), (there, memory.bytes)):
        times = [seconds(partial(target.copy_, source, non_blocking=True), device) for _ in range(5)]
        rates.append(size / median(times) / 1e9)
    return rates[0], rates[1]


def seconds(work: Callable[[], object], device: str) -> float:
    """The time of `work`, until the device has done it."""
    synchronise(device)
    begun = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
