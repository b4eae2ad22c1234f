"""GPU memory of a segment of Wan2.1-T2V-1.3B, the full-size text encoder included, phase by phase.

    python benchmarks/peak_memory.py [--quick] [--directory DIR] --output FOLDER

Makes the model with random weights in DIR (14 GB, removed afterwards), loads it as a run does, encodes a storyboard's
prompts, denoises, decodes, in both modes, and decodes while it denoises. `--quick`: a toy size, on a CPU too.
"""

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

from benchmarks.gpu_results import Results, arguments  # noqa: E402
from benchmarks.real_size import task_for  # noqa: E402
from edit_ray.engine.options import Mode, ModelOptions, SamplingOptions  # noqa: E402
from edit_ray.engine.segment import SegmentEngine  # noqa: E402
from edit_ray.testing import Variant, make_model  # noqa: E402

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


def main() -> None:
    """Measure, print, write."""
    directory = {"type": Path, "help": "where the model is made (default: the temporary folder)"}
    args = arguments(__doc__ or "", seconds=120, directory=directory)
    task = task_for(args.quick, num_inference_steps=4)
    results = Results(args, task.told() | {"quick": args.quick, "prompts": len(PROMPTS)}, figure="peak_GB")
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
