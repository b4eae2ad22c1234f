"""Whether a second pass pays that interpolates: anchors of both sides, from the same noise, without the blocks.

    python benchmarks/refine.py --output benchmarks/results/refine                      8 prompts: long on a CPU
    python benchmarks/refine.py --size 64 --frames 9 --steps 12 --text-tokens 64        a small form: a minute

The first pass has a mask; the residuals of the steps that it computes are the anchors. The second one takes them where
they are, and between two of them their line, or the cubic through the nearest four. Both are compared with the uncached
video, and the second one's seconds with what the same seconds give when the first pass computes more. Writes
results.json in the output folder.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import mean, mean_interval  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from edit_ray import EditWanPipeline  # noqa: E402
from edit_ray.tuning.likeness import psnr  # noqa: E402
from training.evaluate import scenes_of  # noqa: E402

SEED = 88_000  # of scenes and of noise
NEIGHBOURS = {"line": 1, "cubic": 2}  # anchors on each side
Anchors = dict[str, dict[int, Tensor]]  # by branch and step


def every(interval: int, num_steps: int) -> list[bool]:
    """The first two steps, each `interval`-th and the last."""
    return [step < 2 or step % interval == 0 or step == num_steps - 1 for step in range(num_steps)]


def interpolation(known: Sequence[int], step: int, neighbours: int) -> dict[int, float]:
    """The weights at `step` of the polynomial through so many known steps on each side; there are some on both."""
    before, after = [at for at in known if at < step], [at for at in known if at > step]
    nodes = before[-neighbours:] + after[:neighbours]
    return {at: math.prod((step - other) / (at - other) for other in nodes if other != at) for at in nodes}


def rebuilt(anchors: Mapping[int, Tensor], step: int, neighbours: int) -> Tensor:
    """The residual of a step in the second pass."""
    if step in anchors:
        return anchors[step]
    weights = interpolation(sorted(anchors), step, neighbours)
    return sum((anchors[at] * weight for at, weight in weights.items()), torch.zeros_like(anchors[0]))


class Passes:
    """Makes videos of one prompt after the other, timed."""

    def __init__(self, pipe: EditWanPipeline, call: dict[str, Any]) -> None:
        self.pipe, self.call, self.num_steps = pipe, call, call["num_inference_steps"]

    def video(self, prompt: str, seed: int) -> tuple[Tensor, float]:
        """Frames [F, 3, H, W] and the loop's seconds; decoding is no part of them."""
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        latents = self.pipe(prompt, generator=generator, output_type="latent", return_dict=False, **self.call)[0]
        seconds = time.perf_counter() - started
        frames: Tensor = self.pipe._decode(latents, "pt", 0)[0]
        return frames, seconds

    def cached(self, prompt: str, seed: int, hook: Callable[[Any], Any], **options: Any) -> tuple[Tensor, float]:
        """The same with a mask and a hook on each unit."""
        self.pipe.enable_cache("schedule", self.num_steps, **options).on_unit(hook)
        try:
            return self.video(prompt, seed)
        finally:
            self.pipe.disable_cache()

    def first(self, prompt: str, seed: int, **options: Any) -> tuple[Tensor, float, Anchors]:
        """With the residuals that it has computed."""
        anchors: Anchors = {"cond": {}, "uncond": {}}

        def keep(ctx: Any) -> Any:
            def kept(residual: Tensor) -> Tensor:
                anchors[ctx.branch][ctx.step] = residual.clone()
                return residual

            return kept if ctx.decision == "compute" else None

        return *self.cached(prompt, seed, keep, **options), anchors

    def second(self, prompt: str, seed: int, anchors: Anchors, neighbours: int) -> tuple[Tensor, float]:
        """Without any block."""
        return self.cached(
            prompt, seed, lambda ctx: rebuilt(anchors[ctx.branch], ctx.step, neighbours), mask=[True] * self.num_steps
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/refine"), help="a folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan", torch_dtype=torch.float32, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": args.size, "width": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}
    call |= {"guidance_scale": 4.0, "max_sequence_length": args.text_tokens}
    passes = Passes(pipe, call)
    settings = {
        f"every {interval}, {forecast}": {"mask": every(interval, args.steps), "forecast": forecast}
        for interval in (2, 3)
        for forecast in ("reuse", "linear", "spectrum")
    }
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in settings}

    def note(name: str, key: str, frames: Tensor, reference: Tensor, share: float) -> None:
        rows[name].setdefault(key, []).append(psnr(frames, reference))
        rows[name].setdefault(f"{key} time", []).append(share)

    args.output.mkdir(parents=True, exist_ok=True)
    about = provenance(args.device) | {"call": call}
    for index, prompt in enumerate(scenes_of(args.num_prompts, SEED)[1]):
        passes.video(prompt, SEED + index)  # a first call of a prompt is slow
        reference, whole = passes.video(prompt, SEED + index)
        for name, options in settings.items():
            frames, seconds, anchors = passes.first(prompt, SEED + index, **options)
            note(name, "first", frames, reference, seconds / whole)
            for how, neighbours in NEIGHBOURS.items():
                frames, seconds = passes.second(prompt, SEED + index, anchors, neighbours)
                note(name, how, frames, reference, seconds / whole)
        content = about | {"prompts": index + 1, "rows": rows}
        (args.output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, row in rows.items():
        for how in NEIGHBOURS:
            gains = [after - before for after, before in zip(row[how], row["first"], strict=True)]
            gain, low, high = mean_interval(gains, 1)
            print(
                f"{name}: {mean(row['first']):.2f} dB in {mean(row['first time']):.3f} of the uncached time; "
                f"{how} {gain:+.2f} ({low:+.2f} to {high:+.2f}) dB for {mean(row[f'{how} time']):.3f} more"
            )


if __name__ == "__main__":
    main()
