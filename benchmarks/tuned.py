"""Whether what `edit-ray tune` finds keeps its PSNR on prompts that it has not seen.

    python benchmarks/tuned.py --psnr 28 --device cuda --output benchmarks/results/tuned
    python benchmarks/tuned.py --num-prompts 4 --unseen 2 --policies search --budget 60 --steps 8 --size 64 --frames 9

Tunes on some prompts of the embedded model and measures what was found on others, with other seeds: the mean, and in
how many of 200 resamples of these prompts it is at least what was asked for. Writes results.json with every trial, from
the first on, and measurements.jsonl, from which an interrupted run continues.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402

from benchmarks.measure import mean_interval  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from edit_ray import EditWanPipeline  # noqa: E402
from edit_ray.tuning.confidence import resampled_means  # noqa: E402
from edit_ray.tuning.journal import Journal  # noqa: E402
from edit_ray.tuning.likeness import overall  # noqa: E402
from edit_ray.tuning.rank import loop_of  # noqa: E402
from edit_ray.tuning.tune import SEARCH, TUNABLE, Trial, best, tune, tune_by_search  # noqa: E402
from edit_ray.tuning.videos import Videos  # noqa: E402
from training.evaluate import scenes_of  # noqa: E402

RESAMPLES = 200
SEEN, UNSEEN = 55_000, 66_000  # seeds of scenes, and of noise: neither the front's nor the calibration's


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--psnr", type=float, default=28.0, help="what tune is asked for, in dB")
    parser.add_argument("--num-prompts", type=int, default=16, help="to tune on")
    parser.add_argument("--unseen", type=int, default=32, help="prompts to judge on")
    parser.add_argument("--seeds", type=int, default=2, help="videos of each prompt")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--text-tokens", type=int, default=512, help="fewer are faster on a CPU")
    parser.add_argument("--policies", default=",".join([SEARCH, *TUNABLE]))
    parser.add_argument("--budget", type=int, default=400, help="videos of the search")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/tuned"), help="a folder")
    return parser.parse_args()


def main() -> None:
    """Tune, judge, write."""
    args = arguments()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan", torch_dtype=torch.float32, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": args.size, "width": args.size, "num_frames": args.frames, "num_inference_steps": args.steps}
    call |= {"guidance_scale": 4.0, "max_sequence_length": args.text_tokens}
    results: dict[str, Any] = provenance(args.device) | {"psnr": args.psnr, "call": call, "trials": []}
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def write() -> None:
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    def note(trials: list[Trial], found: Iterator[Trial]) -> None:
        for trial in found:
            trials.append(trial)
            results["trials"].append(asdict(trial))
            print(f"{time.monotonic() - started:6.0f} s  {trial}", flush=True)
            write()

    about = {"call": call, "num_prompts": args.num_prompts, "seeds": args.seeds, "device": args.device}
    journal = Journal(args.output / "measurements.jsonl", about)
    seen = Videos(pipe, scenes_of(args.num_prompts, SEEN)[1], SEEN, call, args.seeds, journal)

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    trials: list[Trial] = []
    policies = args.policies.split(",")
    if SEARCH in policies:
        note(trials, tune_by_search(seen, loop_of(pipe, call), args.psnr, args.budget, say))
    fastest = best(trials)
    least = float("inf") if fastest is None else fastest.blocks
    others = [name for name in policies if name != SEARCH]
    note(trials, tune(seen, args.psnr, others, seeds=args.seeds, least=least))
    results["generations"] = seen.made
    found = best(trials)
    if found is None:
        print(f"No setting keeps {args.psnr:g} dB.")
        return
    results["found"] = asdict(found)
    unseen = Videos(pipe, scenes_of(args.unseen, UNSEEN)[1], UNSEEN, call, args.seeds)
    alike, shares = zip(*unseen(found.policy, found.options), strict=True)
    figures = [each.psnr for each in alike]
    mean, low, high = mean_interval(figures, args.seeds)
    held = (resampled_means(figures, args.seeds, RESAMPLES) >= args.psnr).double().mean().item()
    results["unseen"] = {"psnr": mean, "interval": (low, high), "blocks": sum(shares) / len(shares), "all": figures}
    results["unseen"] |= {"held": held, "resamples": RESAMPLES, "likeness": asdict(overall(alike))}
    write()
    print(
        f"{found.policy} {found.options}: asked {args.psnr:g} dB, {found.psnr:.2f} dB on videos seen, "
        f"{mean:.2f} ({low:.2f} to {high:.2f}) on {len(unseen)} others; at least {args.psnr:g} in {held:.1%} of "
        f"{RESAMPLES} resamples of them; {results['generations']} videos were made to tune"
    )


if __name__ == "__main__":
    main()
