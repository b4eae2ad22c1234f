"""Make the embedded model from nothing: clips rendered on the fly, autoencoder, judge, text encoder, transformers.

    python training/tiny_wan.py --output DIR --state DIR
    torchrun --nproc_per_node=2 training/tiny_wan.py --output DIR --state DIR --stage vae --slice 8 --compact

A stage has a budget over all calls, `--minutes` or the recipe's: an interrupted call is repeated and goes on from its
last saved state. `--slice` ends a call earlier, `--end` makes the budget itself end by a time of day, and `--compact`
leaves a state small enough for another machine. `--weights MODEL` gives a finished model's transformer and text encoder
another round, on the same autoencoder.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

from training.loop import Call, Ranks
from training.recipe import FULL, SMOKE
from training.train_causal import train_causal
from training.train_transformer import train_transformer
from training.train_vae import train_vae
from training.world_judge import train_judge

STAGES = ("vae", "judge", "text_and_transformer", "causal")


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model, in diffusers' layout")
    parser.add_argument("--state", type=Path, required=True, help="folder of what a repeated call goes on from")
    parser.add_argument("--minutes", type=float, help="budget of each stage, instead of the recipe's")
    parser.add_argument("--slice", type=float, default=math.inf, help="minutes of that budget in this call")
    parser.add_argument("--end", type=float, default=math.inf, help="seconds since the epoch: when a budget is over")
    parser.add_argument("--compact", action="store_true", help="leave a state of fp16 averaged weights alone")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoder-only", action="store_true", help="train the autoencoder's decoder, not its latents")
    parser.add_argument(
        "--weights", type=Path, help="a finished model whose text and transformer weights to begin with"
    )
    parser.add_argument("--learning-rate", type=float, help="of the transformer, instead of the recipe's")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="take no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="tiny models and batches, to see that everything runs")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    ranks = Ranks.start(args.device)
    recipe = replace(SMOKE if args.smoke else FULL, graphs=args.graphs)
    if args.learning_rate:
        recipe = replace(recipe, learning_rate=args.learning_rate)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        minutes = args.minutes or getattr(recipe, f"{stage}_minutes")
        call = Call(args.output, args.state, recipe, minutes, args.slice, args.device, ranks, args.end)
        if stage == "vae":
            loop = train_vae(call, decoder_only=args.decoder_only)
        elif stage == "judge":
            loop = train_judge(call)
        elif stage == "causal":
            loop = train_causal(call)
        else:
            loop = train_transformer(call, start=args.weights)
        if args.compact:
            loop.compact()
    if ranks.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
