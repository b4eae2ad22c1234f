"""Whether the policy that `edit-ray tune` finds keeps its PSNR on prompts that it has not seen.

    python benchmarks/tuned.py --psnr 28 --device cuda --output benchmarks/results/tuned
    python benchmarks/tuned.py --num-prompts 2 --unseen 2 --policies ranked --steps 8        a look on a CPU

Tunes on some prompts of the embedded model and measures what was found on others, with other seeds. Writes
results.json with every trial, from the first on.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

import torch  # noqa: E402

from benchmarks.measure import mean_interval  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from edit_ray import EditWanPipeline  # noqa: E402
from edit_ray.tuning.tune import TUNABLE, Trial, Videos, best, tune  # noqa: E402
from training.evaluate import scenes_of  # noqa: E402

SEEN, UNSEEN = 55_000, 66_000  # seeds of scenes, and of noise: neither the front's nor the calibration's


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--psnr", type=float, default=28.0, help="what tune is asked for, in dB")
    parser.add_argument("--num-prompts", type=int, default=16, help="to tune on")
    parser.add_argument("--unseen", type=int, default=32, help="prompts to judge on")
    parser.add_argument("--seeds", type=int, default=2, help="videos of each prompt")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--policies", default=",".join(TUNABLE))
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
    call = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": args.steps, "guidance_scale": 4.0}
    results: dict[str, Any] = provenance(args.device) | {"psnr": args.psnr, "trials": []}
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def write() -> None:
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    seen = Videos(pipe, scenes_of(args.num_prompts, SEEN)[1], SEEN, call, args.seeds)
    trials: list[Trial] = []
    for trial in tune(seen, args.psnr, args.policies.split(",")):
        trials.append(trial)
        results["trials"].append(asdict(trial))
        print(f"{time.monotonic() - started:6.0f} s  {trial}", flush=True)
        write()
    found = best(trials)
    if found is None:
        print(f"No setting keeps {args.psnr:g} dB.")
        return
    results["found"] = asdict(found)
    unseen = Videos(pipe, scenes_of(args.unseen, UNSEEN)[1], UNSEEN, call, args.seeds)
    figures, shares = zip(*unseen(found.policy, found.options), strict=True)
    mean, low, high = mean_interval(figures, args.seeds)
    results["unseen"] = {"psnr": mean, "interval": (low, high), "blocks": sum(shares) / len(shares), "all": figures}
    write()
    print(
        f"{found.policy} {found.options}: asked {args.psnr:g} dB, {found.psnr:.2f} dB on {len(seen)} videos seen, "
        f"{mean:.2f} ({low:.2f} to {high:.2f}) on {len(unseen)} others"
    )


if __name__ == "__main__":
    main()
