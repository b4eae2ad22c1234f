"""GPU memory of a segment of Wan2.1-T2V-1.3B, the full-size text encoder included, phase by phase.

    python benchmarks/peak_memory.py [--quick] [--directory DIR] --output FOLDER

Makes the model with random weights in DIR (14 GB, removed afterwards), loads it as a run does, encodes a storyboard's
prompts, denoises, decodes, in both modes, and decodes while it denoises. `--quick`: a toy size, on a CPU too.

    python benchmarks/peak_memory.py --cards 12 16 24 48 80 --output benchmarks/results/cards

What `edit-ray plan` says of larger models on cards of so many GB, and what a process takes that is held to as much: two
steps, decoding, and two steps beside the decoder's state. Fragments are what torch cannot give back afterwards.

With two other checks of larger models in one call of less than eight minutes, on one H200:

    python benchmarks/skip_cost.py --layouts i2v-14B i2v-A14B vace-14B --seconds 120 --output $OUT/skip_layouts;
    python benchmarks/block_offload.py --seconds 150 --output $OUT/block_offload;
    python benchmarks/peak_memory.py --cards 12 16 24 48 80 --seconds 170 --output $OUT/cards
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from benchmarks.gpu_results import LeftOut, Results, arguments  # noqa: E402
from benchmarks.real_size import Task, make_pipe, memory_peak, task_for  # noqa: E402
from edit_ray.engine.card_memory import FREE, Placement, Run, needs_of, place  # noqa: E402
from edit_ray.engine.options import Mode, ModelOptions, SamplingOptions  # noqa: E402
from edit_ray.engine.segment import SegmentEngine  # noqa: E402
from edit_ray.testing import VARIANTS, Variant, make_model  # noqa: E402

PROMPTS = [f"a lighthouse on a rocky coast, take {take}" for take in range(4)]
SHARED = ("load", "encode 5 prompts")  # phases of both modes
TOY = Variant(
    {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 2, "text_dim": 32},
    flow_shift=3.0,
    vae={"base_dim": 4, "num_res_blocks": 1},
    text_encoder={"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
)


class Phases:
    """Seconds and peak memory of each phase, a row each."""

    def __init__(self, results: Results) -> None:
        self.on_gpu, self.results = torch.cuda.is_available(), results

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; a phase that fails ends the benchmark."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        done = work()
        if self.on_gpu:
            torch.cuda.synchronize()
        with self.results.row(name) as figures:
            figures["seconds"] = time.perf_counter() - started
            if self.on_gpu:
                figures["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
                figures["reserved_GB"] = torch.cuda.max_memory_reserved() / 1e9
                figures["allocated_GB"] = torch.cuda.memory_allocated() / 1e9
        return done


def measure(folder: Path, quick: bool, phases: Phases) -> None:
    """Everything on one loaded model."""
    size: dict[str, Any] = {"height": 480, "width": 832, "num_frames": 33}
    if quick:
        size = {"height": 32, "width": 48, "num_frames": 9}
    sampling = SamplingOptions(**size, num_inference_steps=4, guidance_scale=5.0)
    model = ModelOptions(path=str(folder), torch_dtype="bfloat16")
    engine: SegmentEngine = phases.phase(SHARED[0], lambda: SegmentEngine.load(model))
    phases.phase(SHARED[1], lambda: engine.encode_prompts(PROMPTS))
    modes: tuple[Mode, ...] = ("exact", "fast")
    for mode in modes:
        engine.use_mode(mode)

        def denoise(take: int = 0) -> torch.Tensor:
            return engine.denoise(sampling, prompt=PROMPTS[take], seed=take)

        latents = phases.phase(f"{mode}: denoise, first", denoise)
        phases.phase(f"{mode}: denoise", denoise)

        def decode(latents: torch.Tensor = latents) -> torch.Tensor:
            return engine.decode(None, latents)

        phases.phase(f"{mode}: decode, first", decode)
        phases.phase(f"{mode}: decode", decode)
        if phases.on_gpu:
            torch.cuda.empty_cache()

        def both(latents: torch.Tensor = latents) -> None:
            with ThreadPoolExecutor(1) as beside:
                decoded = beside.submit(engine.decode, None, latents)
                denoise(1)
                decoded.result()

        phases.phase(f"{mode}: denoise and decode at once", both)


CARD_RUNS = {"t2v-14B": (480, 832, 81), "ti2v-5B": (704, 1280, 121)}
MOST_WRONG = 0.08


def measure_cards(results: Results, args: Any) -> None:
    """Each model on each card, the largest first."""
    cards, quick, device = args.cards, args.quick, args.device
    for name in args.models:
        height, width, num_frames = CARD_RUNS[name]
        variant = VARIANTS[name]
        task = Task(f"Wan {name}, random weights", variant, height=height, width=width, num_frames=num_frames)
        if quick:
            task = task_for(True)
        size: dict[str, Any] = task.size
        run = Run(**size, branches=2, torch_dtype=task.torch_dtype)
        configs = {"transformer": task.variant.transformer, "vae": task.variant.vae}
        needs = needs_of(configs, run, per_token=task.variant.expand_timesteps)
        pipe = make_pipe(task, device)
        for card in sorted(cards, reverse=True):
            row = f"{name}, {card:g} GB"
            if results.time_for(row):
                placed = place(needs, int(card * 1e9), args.free)
                with results.row(row) as figures:  # of its own: what runs out of memory keeps it
                    if placed is None:
                        raise LeftOut("it does not fit, says the plan")
                    figures.update(planned_GB=placed.peak / 1e9, device_bytes=placed.device_bytes, tiled=placed.tiled)
                if placed is not None:
                    with results.row(row) as figures:
                        on_card(figures, pipe, task, placed, card, device)
            ratio = results.of(row).get("ratio")
            results.bar(f"{row}: measured off the plan by", None if ratio is None else abs(ratio - 1), most=MOST_WRONG)
        del pipe


def on_card(figures: dict[str, Any], pipe: Any, task: Task, placed: Placement, card: float, device: str) -> None:
    """One card's row: the peaks of each phase, and the largest beside the planned one."""
    sampling = SamplingOptions(**task.size, num_inference_steps=2, guidance_scale=5.0)  # type: ignore[arg-type]
    pipe.disable_block_offload()
    if placed.device_bytes is not None:
        pipe.enable_block_offload(device, placed.device_bytes)
    engine, peaks = SegmentEngine(pipe), []
    engine.encode_prompts(PROMPTS[:1])
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        of_card = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(card * 1e9 / of_card, 1.0))
    tiled_from = 0 if placed.tiled else None
    memory_peak(device, reset=True)  # of the pipeline that was made, and of the card before
    try:
        latents = engine.denoise(sampling, prompt=PROMPTS[0], seed=0)
        peaks.append(memory_peak(device, reset=True))
        engine.decode("run", latents, tiled_from=tiled_from)
        peaks.append(memory_peak(device, reset=True))
        engine.denoise(sampling, prompt=PROMPTS[0], seed=1)
        peaks.append(memory_peak(device, reset=True))
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    measured = [peak for peak in peaks if peak is not None]
    if measured:
        denoise, decode, beside = (peak / 1e9 for peak in measured)
        figures.update(denoise_GB=denoise, decode_GB=decode, beside_decoder_GB=beside)
        figures.update(peak_GB=max(measured) / 1e9, ratio=max(measured) / placed.peak)
        torch.cuda.empty_cache()
        figures["fragments_GB"] = (torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / 1e9


def main() -> None:
    """Measure, print, write."""
    directory = {"type": Path, "help": "where the model is made (default: the temporary folder)"}
    cards = {"type": float, "nargs": "*", "default": [], "help": "their memory in GB; these alone"}
    free = {"type": float, "default": FREE, "help": "of a card, what the plan leaves free"}
    models = {"nargs": "*", "choices": list(CARD_RUNS), "default": list(CARD_RUNS), "help": "on the cards"}
    args = arguments(__doc__ or "", seconds=120, directory=directory, cards=cards, free=free, models=models)
    task = task_for(args.quick, num_inference_steps=4)
    results = Results(args, task.told() | {"quick": args.quick, "prompts": len(PROMPTS)}, figure="peak_GB")
    if args.cards:
        measure_cards(results, args)
        results.finish()
        return
    phases = Phases(results)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        variant: Any = TOY if args.quick else "t2v-1.3B"
        phases.phase("make", lambda: make_model(Path(folder) / "model", variant, device=torch.device(args.device)))
        if phases.on_gpu:
            torch.cuda.empty_cache()
        measure(Path(folder) / "model", args.quick, phases)
    judge(results)
    results.finish()


def judge(results: Results) -> None:
    """The most that any phase of each mode takes; making the model is none."""
    for mode in ("exact", "fast"):
        phases = [row for row in results.rows if row["name"] in SHARED or row["name"].startswith(mode)]
        peaks = [row["peak_GB"] for row in phases if "peak_GB" in row]
        results.bar(f"peak memory, full-size text encoder included, {mode}, GB", max(peaks, default=None), most=12)


if __name__ == "__main__":
    main()
