"""What it costs to keep a transformer's blocks in host memory: A14B's layout under the memory of a smaller card.

    python benchmarks/block_offload.py --output benchmarks/results/block_offload      on a GPU
    python benchmarks/block_offload.py --quick                                        a toy on a CPU

Both experts of Wan2.2-A14B with random weights, a few steps without guidance: resident, their blocks offloaded with the
device's memory capped, and the same with a mask that skips half of the steps; beside it diffusers' group offloading of
single blocks on a stream. A row's time is the median of its later steps, and of a masked loop its whole, by computed
step. Latents are compared with those of the resident loop.
"""

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from torch import Tensor

from benchmarks.gpu_results import LeftOut, Results, arguments
from benchmarks.real_size import Task, embeds, make_pipe, synchronise, task_for
from edit_ray import EditWanPipeline
from edit_ray.testing import VARIANTS

MOST_SLOWER, LEAST_SPARED = 1.10, 0.45


def main() -> None:
    """Measure each row, compare, and write the results."""
    args = arguments(
        __doc__ or "",
        seconds=400,
        steps={"type": int, "default": 6, "help": "of a loop"},
        card={"type": float, "default": 24, "help": "the capped device's memory in GB"},
        weights={"type": float, "default": 15, "help": "what of it is for the transformer's weights, in GB"},
    )
    task = task_for(args.quick, num_frames=9 if args.quick else 81, num_inference_steps=args.steps, guidance_scale=1.0)
    if not args.quick:
        task = Task("Wan2.2-A14B's layout, both experts, random weights", VARIANTS["t2v-A14B"], num_frames=81)
    results = Results(args, {**task.told(), "num_inference_steps": args.steps, "guidance_scale": 1.0}, figure="step_s")
    pipe = make_pipe(task, args.device)
    text = {"prompt_embeds": embeds(pipe)["prompt_embeds"]}
    mask = [step % 2 == 0 for step in range(args.steps)]
    run = loop(pipe, task, args.steps, text, args.device)

    whole, masked = run(results, "resident", None), run(results, "resident, half of the steps skipped", mask)
    weights = int(args.weights * 1e9)
    experts = [expert for expert in (pipe.transformer, pipe.transformer_2) if expert is not None]
    if args.quick:
        weights = sum(t.nbytes for expert in experts for t in expert.parameters()) * 8 // 10
    pipe.enable_block_offload(args.device, weights)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        of_card = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.card * 1e9 / of_card)
    equal = torch.equal(run(results, "blocks offloaded", None), whole)
    equal &= torch.equal(run(results, "blocks offloaded, half of the steps skipped", mask), masked)
    pipe.disable_block_offload()
    with results.row("diffusers' group offloading") as figures:
        if args.device != "cuda":
            raise LeftOut("needs a GPU")
        for expert in experts:
            expert.enable_group_offload(
                onload_device=torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
            )
        run(results, "diffusers' group offloading", None, figures)
    of = results.of
    resident, offloaded = of("resident").get("step_s"), of("blocks offloaded").get("step_s")
    if resident and offloaded:
        results.bar("offloaded ÷ resident, a step", offloaded / resident, most=MOST_SLOWER)
    copied, masked_copied = (
        of(name).get("copied_bytes") for name in ("blocks offloaded", "blocks offloaded, half of the steps skipped")
    )
    if copied and masked_copied:
        results.bar("bytes not copied for skipped steps", 1 - masked_copied / copied, least=LEAST_SPARED)
    results.note(f"Latents are {'equal' if equal else 'NOT equal'} to those of the resident loop, bit for bit.")
    results.finish()


def loop(pipe: EditWanPipeline, task: Task, steps: int, text: dict[str, Any], device: str) -> Callable[..., Tensor]:
    """A function that runs a loop as a row, and returns its latents."""

    def run(results: Results, name: str, mask: list[bool] | None, into: dict[str, Any] | None = None) -> Tensor:
        if into is not None:
            return measured(into, mask)
        with results.row(name) as figures:
            latents = measured(figures, mask)
        return latents

    def measured(figures: dict[str, Any], mask: list[bool] | None) -> Tensor:
        if mask is not None:
            pipe.enable_cache("schedule", steps, mask=mask)
        if pipe.block_offload is not None:
            pipe.block_offload.copied_bytes = 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        size: dict[str, Any] = task.size
        times = [time.perf_counter()]

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            synchronise(device)
            times.append(time.perf_counter())
            return {}

        output: Any = pipe(
            **size, **text, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
            generator=torch.Generator().manual_seed(0), callback_on_step_end=after_step,
        )  # fmt: skip
        latents: Tensor = output.frames
        each = [after - before for before, after in pairwise(times[1:])]
        computed = (
            each if mask is None else [seconds for seconds, compute in zip(each, mask[1:], strict=True) if compute]
        )
        figures["step_s"], figures["loop_s"] = median(computed), times[-1] - times[0]
        if device == "cuda":
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if pipe.block_offload is not None:
            figures["copied_bytes"] = pipe.block_offload.copied_bytes
        pipe.disable_cache()
        return latents

    return run


if __name__ == "__main__":
    main()
