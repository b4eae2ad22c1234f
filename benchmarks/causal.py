"""A causal model at its real size: steady state, first chunk, memory, and what a chunk's time is made of.

    python benchmarks/causal.py --output benchmarks/results/causal      on a GPU, within five minutes
    python benchmarks/causal.py --quick --device cpu                    a toy

causal-1.3B with random weights, 480x832, a window of 12 latents of which 3 are the sink, chunks of 3. A row's
frames/s are those of the median chunk with a full window, denoised and decoded; its first chunk begins with nothing in
the window, once everything is compiled. Beside ours the plain loop: the same steps by diffusers' transformer, whose
processors keep rotated keys in a list and concatenate them in every forward, and the whole decoded as it goes by the
same decoder. Memory is that of the allocator after each chunk.
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
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from benchmarks.gpu_results import Results, arguments
from benchmarks.real_size import Task, decoding, embeds, make_pipe, synchronise, task_for
from edit_ray import EditCausalWanPipeline
from edit_ray.engine.causal_attention import rotate
from edit_ray.engine.causal_stream import VideoChunk
from edit_ray.engine.decode import StreamingDecoder
from edit_ray.testing import VARIANTS

WINDOW, SINK, CHUNK = 12, 3, 3
LEAST_FPS, MOST_GROWTH = 25.0, 0.005
POSITIONS = 20  # of chunks, in the plain loop
FRAMES = 4 * CHUNK  # of a chunk


def main() -> None:
    """Measure each row, compare, and write the results."""
    args = arguments(
        __doc__ or "",
        seconds=240,
        chunks={"type": int, "default": 20, "help": "with a full window, in each row"},
        flat={"type": int, "default": 200, "help": "chunks over which memory is watched"},
    )
    few = {"chunks": 3, "flat": 6} if args.quick else {"chunks": args.chunks, "flat": args.flat}
    task = task_of(args.quick, "causal-1.3B")
    told = {**task.told(), "window": WINDOW, "sink": SINK, "chunk_size": CHUNK}
    results = Results(args, told, figure="frames_s")
    pipe, text = pipeline(task, args.device)

    with results.row("plain loop: diffusers, concatenated K/V") as figures, torch.no_grad():
        figures["ours"] = False
        measure(figures, plain_loop(pipe, task, text, args.device), few["chunks"], args.device)
    for mode in ("exact", "fast"):
        with results.row(f"ours, {mode}, rope relative") as figures:
            watched = few if mode == "fast" else few | {"flat": 0}
            mode_row(figures, pipe, task, text, mode, watched, args.device)
    with results.row("ours, fast, rope absolute") as figures:
        mode_row(figures, pipe, task, text, "fast", few | {"flat": 0}, args.device, rope="absolute")
    with results.row("parts of a chunk") as figures, torch.no_grad():
        parts(figures, pipe, args.device, task)
    fast, plain = results.of("ours, fast, rope relative"), results.of("plain loop: diffusers, concatenated K/V")
    results.bar("frames/s, denoised and decoded, fast", fast.get("frames_s"), least=LEAST_FPS)
    results.bar("growth of memory over the chunks", fast.get("growth"), most=MOST_GROWTH)
    if fast and plain:
        results.bar("frames/s, fast ÷ plain loop", fast["frames_s"] / plain["frames_s"], least=1.0)
    results.finish()


def task_of(quick: bool, variant: str) -> Task:
    """A chunk of this model, or of a toy."""
    if quick:
        return task_for(quick, num_frames=FRAMES, num_inference_steps=4, guidance_scale=1.0)
    sizes: dict[str, Any] = {"num_frames": FRAMES, "num_inference_steps": 4, "guidance_scale": 1.0}
    return Task(f"{variant}, random weights", VARIANTS[variant], **sizes)


def pipeline(task: Task, device: str) -> tuple[EditCausalWanPipeline, Tensor]:
    """A causal pipeline with weights drawn on the device, and a prompt's embedding."""
    plain = make_pipe(task, device)
    text = embeds(plain)["prompt_embeds"]
    plain.text_encoder.to("cpu")
    pipe = EditCausalWanPipeline(**plain.components, causal={"window": WINDOW, "sink": SINK, "chunk_size": CHUNK})
    pipe.set_progress_bar_config(disable=True)
    return pipe, text


def mode_row(
    figures: dict[str, Any],
    pipe: EditCausalWanPipeline,
    task: Task,
    text: Tensor,
    mode: str,
    few: dict[str, int],
    device: str,
    rope: str = "relative",
) -> None:
    """A stream in this mode; the second one is measured, so that the first has compiled everything."""
    pipe.precompute.mode = "fast" if mode == "fast" else "exact"

    def stream() -> Any:
        call: dict[str, Any] = {"height": task.height, "width": task.width, "prompt_embeds": text, "rope": rope}
        return pipe.stream(**call, generator=torch.Generator().manual_seed(0))

    with decoding(pipe, mode if device == "cuda" else "exact"):
        begun = time.perf_counter()
        warm = stream()
        for _ in range(WINDOW // CHUNK + 1):
            next(warm)
        figures["warm_up_s"] = time.perf_counter() - begun
        warm.close()
        figures["kv_gb"] = warm.kv.layout.entry_bytes * pipe.denoiser.config.num_layers * (WINDOW // CHUNK) / 1e9
        measured = stream()
        measure(figures, measured, few["chunks"], device)
        memory = [allocated(device)]
        for _ in range(few["flat"]):
            next(measured)
            memory.append(allocated(device))
        measured.close()
    figures["memory_gb"] = memory[0] / 1e9
    if few["flat"]:
        figures["growth"] = max(memory) / memory[0] - 1 if memory[0] else 0.0


def measure(figures: dict[str, Any], chunks: Iterator[Any], count: int, device: str) -> None:
    """The first chunk's seconds, the median of `count` with a full window, and frames/s; the peak of memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(WINDOW // CHUNK + count):
        synchronise(device)
        begun = time.perf_counter()
        next(chunks)
        synchronise(device)
        times.append(time.perf_counter() - begun)
    steady = times[WINDOW // CHUNK :]
    figures["first_chunk_s"], figures["chunk_s"] = times[0], median(steady)
    figures["frames_s"], figures["slowest_s"] = FRAMES / median(steady), max(steady)
    if device == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9


def allocated(device: str) -> int:
    return int(torch.cuda.memory_allocated()) if device == "cuda" else 0


class ListOfKV:
    """Self-attention over rotated keys and values in a list, as a plain implementation has them."""

    def __init__(self, rope_of: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.rope_of, self.kept, self.clean = rope_of, list[tuple[Tensor, Tensor]](), False

    def __call__(self, attn: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (
            each.unflatten(2, (attn.heads, -1)) for each in (attn.norm_q(query), attn.norm_k(key), value)
        )
        query, key = (rotate(each, self.rope_of()) for each in (query, key))
        keys, values = (torch.cat(each, dim=1) for each in zip(*self.kept, (key, value), strict=True))
        attended: Tensor = dispatch_attention_fn(query, keys, values).flatten(2, 3)
        if self.clean:
            self.kept.append((key, value))
            if len(self.kept) == WINDOW // CHUNK:
                del self.kept[SINK // CHUNK]
        out: Tensor = attn.to_out[0](attended)
        return out


@torch.no_grad()
def plain_loop(pipe: EditCausalWanPipeline, task: Task, text: Tensor, device: str) -> Iterator[VideoChunk | None]:
    """Chunks of the published loop, without our pipeline; what it changes on the transformer ends with it."""
    model, decoder, channels = pipe.transformer, StreamingDecoder(pipe.vae), pipe.denoiser.config.in_channels
    factor = pipe.vae_scale_factor_spatial
    shape = (1, channels, CHUNK, task.height // factor, task.width // factor)
    cos, sin = model.rope(torch.empty(*shape[:2], POSITIONS * CHUNK, *shape[3:], device=device))
    tokens, at = cos.shape[1] // POSITIONS, 0

    def rope_of() -> tuple[Tensor, Tensor]:
        first = at % POSITIONS * tokens  # the values of the angles do not matter here
        return cos[:, first : first + tokens], sin[:, first : first + tokens]

    with replaced(model, [ListOfKV(rope_of) for _ in model.blocks]) as kept:
        while True:
            x = torch.randn(shape, device=device)
            for step, sigma in enumerate(pipe.causal.sigmas):
                t = torch.full((1,), sigma * 1000, device=device)
                clean = x - sigma * model(x.to(text.dtype), t, text, return_dict=False)[0].float()
                after = [*pipe.causal.sigmas, 0.0][step + 1]
                x = (1 - after) * clean + after * torch.randn(shape, device=device)
            for each in kept:
                each.clean = True
            model(x.to(text.dtype), torch.zeros(1, device=device), text, return_dict=False)
            for each in kept:
                each.clean = False
            decoder.decode(x).cpu()
            at += 1
            yield None


@contextmanager
def replaced(model: Any, processors: list[ListOfKV]) -> Iterator[list[ListOfKV]]:
    """Inside, the blocks' self-attention is by these processors."""
    before = [block.attn1.processor for block in model.blocks]
    for block, processor in zip(model.blocks, processors, strict=True):
        block.attn1.processor = processor
    try:
        yield processors
    finally:
        for block, processor in zip(model.blocks, before, strict=True):
            block.attn1.processor = processor


def parts(figures: dict[str, Any], pipe: EditCausalWanPipeline, device: str, task: Task) -> None:
    """Milliseconds of a chunk's attention over a full window, of its matrix products, each alone, and of decoding."""
    config, dtype = pipe.denoiser.config, task.dtype
    factor, heads, head_dim = pipe.vae_scale_factor_spatial, config.num_attention_heads, config.attention_head_dim
    tokens = CHUNK * (task.height // factor // 2) * (task.width // factor // 2)
    width, forwards = heads * head_dim, len(pipe.causal.timesteps) + 1

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    query, key, value = (drawn(1, heads, count * tokens, head_dim) for count in (1, WINDOW // CHUNK, WINDOW // CHUNK))
    text = drawn(1, heads, 512, head_dim)
    rows, wide = drawn(tokens, width), drawn(tokens, config.ffn_dim)
    square, up, down = drawn(width, width), drawn(config.ffn_dim, width), drawn(width, config.ffn_dim)
    each = forwards * config.num_layers
    figures["attention_ms"] = each * ms(partial(F.scaled_dot_product_attention, query, key, value), device)
    figures["text_attention_ms"] = each * ms(partial(F.scaled_dot_product_attention, query, text, text), device)
    squares = 6 * ms(partial(F.linear, rows, square), device)  # query, key, value, two outputs, the text's query
    figures["products_ms"] = each * (
        squares + ms(partial(F.linear, rows, up), device) + ms(partial(F.linear, wide, down), device)
    )
    latents = torch.randn(1, config.in_channels, CHUNK, task.height // factor, task.width // factor, device=device)
    for mode in ("exact", "fast") if device == "cuda" else ("exact",):
        with decoding(pipe, mode):
            decoder = StreamingDecoder(pipe.vae)
            decoder.decode(latents)
            figures[f"decode_{mode}_ms"] = ms(partial(decoder.decode, latents), device, times=5)


def ms(work: Callable[[], object], device: str, times: int = 20) -> float:
    """Milliseconds of `work`, the mean of some after as many again."""
    for _ in range(times):
        work()
    synchronise(device)
    begun = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - begun) / times * 1e3


if __name__ == "__main__":
    main()
