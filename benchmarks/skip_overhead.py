"""What a skipped step costs beside the work that no cache can skip: patch embedding, conditioning, output projection.

    python benchmarks/skip_overhead.py [--pairs 300] [--threads N] [--json FILE]

On the embedded model, in the form in which its pipeline calls it (a timestep per token), forwards that skip the whole
stack alternate with forwards of the same transformer without blocks. Prints the median of the pairs' ratios.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import torch
from torch import Tensor, nn

from benchmarks.provenance import provenance
from edit_ray import EditWanPipeline
from edit_ray.cache import apply_cache_on_transformer

FRAMES, SIZE = 9, 16  # latents of 33 frames at 128 x 128


def timed(forward: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    forward()
    return time.perf_counter() - started


def measure(pairs: int) -> list[tuple[float, float]]:
    """Seconds of (a skipped forward, a forward without blocks), alternating."""
    transformer = EditWanPipeline.from_pretrained("builtin:tiny_wan").transformer
    bare = copy.deepcopy(transformer)
    bare.blocks = nn.ModuleList()
    tokens = FRAMES * SIZE * SIZE // 4
    inputs = {
        "hidden_states": torch.randn(1, transformer.config.in_channels, FRAMES, SIZE, SIZE),
        "timestep": torch.full((1, tokens), 500),
        "encoder_hidden_states": torch.randn(1, 512, transformer.config.text_dim),
        "return_dict": False,
    }
    steps = pairs + 21
    mask = [True] + [False] * (steps - 1)
    apply_cache_on_transformer(transformer, "schedule", steps, mask=mask)
    measured = []
    for step in range(steps):
        with transformer.cache_context("cond", step_index=step, num_inference_steps=steps):
            skipped = timed(lambda: transformer(**inputs)[0])
        with bare.cache_context("cond", step_index=step, num_inference_steps=steps):
            fixed = timed(lambda: bare(**inputs)[0])
        measured.append((skipped, fixed))
    return measured[21:]  # the first step computes, the next warm up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        pairs = measure(args.pairs)
    figures = {
        **provenance("cpu"),
        "pairs": len(pairs),
        "threads": args.threads,
        "skipped_ms": 1000 * statistics.median(skipped for skipped, _ in pairs),
        "fixed_ms": 1000 * statistics.median(fixed for _, fixed in pairs),
        "median_ratio": statistics.median(skipped / fixed for skipped, fixed in pairs),
    }
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
