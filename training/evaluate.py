"""Judge a model folder: one line a criterion with the figure, the bar and PASS or FAIL; exit code 1 on a FAIL.

    python training/evaluate.py                    everything, 64 + 64 samples: 20 s on a GPU, long on a CPU
    python training/evaluate.py --quick            a subset, with the same bars
    python training/evaluate.py --device cuda --json results.json
    python training/evaluate.py --judge STATE      the small world too, by the judge of the training's state folder
    python training/evaluate.py --model DIR --causal DIR/causal    the causal model, beside the one it was made of

Scenes, prompts and noise come from seeds that the training never draws.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from anywhere

from edit_ray import EditWanPipeline  # noqa: E402
from training.criteria import QUICK, Result, Size, percent  # noqa: E402
from training.evaluate_causal import evaluate_causal  # noqa: E402
from training.evaluate_world import evaluate_world  # noqa: E402
from training.judge import Verdict, background_colour, judge  # noqa: E402
from training.recipe import FULL  # noqa: E402
from training.sampling import HISTORY, decode, load_causal, sample_latents  # noqa: E402
from training.scenes import Scenes, captions, draw_scenes, render  # noqa: E402
from training.world_judge import WorldJudge, load_judge  # noqa: E402

SEED = 1000  # far below the training's


def scenes_of(number: int, seed: int, objects: int | None = None) -> tuple[Scenes, list[str]]:
    """Scenes and reworded captions of a seed."""
    generator = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(number, generator, objects)
    return scenes, captions(scenes, generator)


def psnr_by_frame(pipe: EditWanPipeline, number: int, num_frames: int, seed: int, batch: int) -> Tensor:
    """PSNR in dB of each clip and frame, [number, num_frames], after encoding and decoding by the stock autoencoder."""
    scenes, _ = scenes_of(number, seed)
    figures = []
    for start in range(0, number, batch):
        clip = render(scenes[slice(start, start + batch)].to(pipe.vae.device), num_frames)
        with torch.no_grad():
            decoded = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample
        error = ((decoded - clip) / 2).square().mean((1, 3, 4))
        figures.append(-10 * error.log10().cpu())
    return torch.cat(figures)


def judge_autoencoder(pipe: EditWanPipeline, size: Size) -> Iterator[Result]:
    """PSNR on short and on long clips."""
    short = psnr_by_frame(pipe, size.clips, 33, SEED, size.batch)
    yield Result(f"VAE PSNR, {size.clips} clips of 33 frames, mean", short.mean().item(), 32, "dB")
    yield Result("VAE PSNR, worst frame index of 33", short.mean(0).min().item(), 31, "dB")
    long = psnr_by_frame(pipe, size.long_clips, 129, SEED + 1, max(1, size.batch // 4))
    yield Result(f"VAE PSNR, {size.long_clips} clips of 129, worst index", long.mean(0).min().item(), 30, "dB")


def judge_judge(device: str, size: Size) -> Iterator[Result]:
    """The judge on rendered clips, with their captions and with another clip's."""
    scenes, _ = scenes_of(size.rendered, SEED + 2)
    right, shuffled = [], []
    for start in range(0, size.rendered, size.batch):
        rows = slice(start, start + size.batch)
        clip = render(scenes[rows].to(device), 33)
        right.append(judge(clip, scenes[rows]).everything())
        shuffled.append(judge(clip.roll(1, 0), scenes[rows]).everything())
    yield Result("judge right on rendered clips", percent(torch.cat(right)), 99, "%")
    yield Result("judge right with captions shuffled", percent(torch.cat(shuffled)), 30, "%", most=True)


@dataclass(frozen=True)
class Sampled:
    """Samples from text: their scenes, prompts, latents and verdict."""

    scenes: Scenes
    prompts: list[str]
    latents: Tensor
    verdicts: list[Verdict]

    def part(self, name: str) -> Tensor:
        """One field of the verdicts, over all samples."""
        return torch.cat([getattr(verdict, name) for verdict in self.verdicts])


def sample(pipe: EditWanPipeline, objects: int, size: Size) -> Sampled:
    """Sample and judge prompts that name so many objects."""
    scenes, prompts = scenes_of(size.samples, SEED + 2 + objects, objects)
    latents, verdicts = [], []
    for start in range(0, size.samples, size.batch):
        rows = slice(start, start + size.batch)
        seeds = [SEED * objects + index for index in range(size.samples)[rows]]
        latents.append(sample_latents(pipe, prompts[rows], seeds))
        verdicts.append(judge(decode(pipe, latents[-1]), scenes[rows]))
    return Sampled(scenes, prompts, torch.cat(latents), verdicts)


def judge_samples(one: Sampled, two: Sampled) -> Iterator[Result]:
    """Colours, forms and background of samples, over the clip and at frame 0."""
    for suffix, when in (("", "over the clip"), ("_first", "at frame 0")):
        for name, samples, bar in (("one object", one, 95), ("two objects", two, 90)):
            yield Result(f"named colours, {name}, {when}", percent(samples.part("colours" + suffix)), bar, "%")
        forms = torch.cat([one.part("forms" + suffix)[:, 0], two.part("forms" + suffix).flatten()])
        yield Result(f"forms, {when}", percent(forms), 85, "%")
        background = torch.cat([samples.part("background" + suffix) for samples in (one, two)])
        yield Result(f"background, {when}", percent(background), 98, "%")


def judge_joins(pipe: EditWanPipeline, one: Sampled, two: Sampled, size: Size) -> Iterator[Result]:
    """Whether the step over the join is no larger than the largest inside the clips, when samples are continued."""
    each = size.continuations // 2
    prompts = one.prompts[:each] + two.prompts[:each]
    first = torch.cat([one.latents[:each], two.latents[:each]])
    smooth = []
    for start in range(0, len(prompts), size.batch):
        rows = slice(start, start + size.batch)
        seeds = [SEED * 3 + index for index in range(len(prompts))[rows]]
        following = sample_latents(pipe, prompts[rows], seeds, first[rows, :, -HISTORY:])
        clip = decode(pipe, torch.cat([first[rows], following[:, :, HISTORY:]], 2))
        steps = clip.diff(dim=2).abs().mean((1, 3, 4))  # [B, T - 1]
        join = 4 * first.shape[2] - 4  # from the first clip's last frame
        inside = torch.cat([steps[:, :join], steps[:, join + 1 :]], 1).amax(1)
        smooth.append(steps[:, join] <= inside)
    yield Result(f"smooth joins of {len(prompts)}", percent(torch.cat(smooth)), 90, "%")


def judge_drift(pipe: EditWanPipeline, one: Sampled, two: Sampled, size: Size) -> Iterator[Result]:
    """How far the mean background colour strays from the first segment's over joined segments, worst chain."""
    each = max(1, size.chains // 2)
    prompts = (one.prompts[:each] + two.prompts[:each])[: size.chains]
    latents = torch.cat([one.latents[:each], two.latents[:each]])[: size.chains]
    new = latents.shape[2] - HISTORY
    for segment in range(1, size.segments):
        seeds = [SEED * (3 + segment) + index for index in range(len(prompts))]
        following = sample_latents(pipe, prompts, seeds, latents[:, :, -HISTORY:])
        latents = torch.cat([latents, following[:, :, HISTORY:]], 2)
    worst = 0.0
    for chain in latents:
        clip = decode(pipe, chain[None])[0]
        bounds = [0, *(33 + 4 * new * segment for segment in range(size.segments))]
        colours = [background_colour(clip[:, a:b]) for a, b in pairwise(bounds)]
        worst = max(worst, max((colour - colours[0]).abs().max().item() for colour in colours))
    yield Result(f"background drift over {size.segments} segments", worst, 8, "/255", most=True)


def evaluate(pipe: EditWanPipeline, size: Size, world_judge: WorldJudge | None = None) -> Iterator[Result]:
    """Every criterion, as soon as it is known."""
    yield from judge_judge(str(pipe.vae.device), size)
    yield from judge_autoencoder(pipe, size)
    one, two = sample(pipe, 1, size), sample(pipe, 2, size)
    yield from judge_samples(one, two)
    yield from judge_joins(pipe, one, two, size)
    yield from judge_drift(pipe, one, two, size)
    if world_judge:
        yield from evaluate_world(pipe, world_judge, size)


def main() -> int:
    """Evaluate, print, and say by the exit code whether all bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny_wan", help="what EditWanPipeline.from_pretrained takes")
    parser.add_argument("--quick", action="store_true", help="few samples: a look, not the proof")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--judge", type=Path, help="the training's state folder, which holds the small world's judge")
    parser.add_argument("--causal", type=Path, help="the folder of a causal model, to be judged instead")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    args = parser.parse_args()
    started = time.monotonic()
    pipe = EditWanPipeline.from_pretrained(args.model, torch_dtype=torch.float32, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    results = []
    size = QUICK if args.quick else Size()
    size = replace(size, batch=64) if args.device == "cuda" else size
    judge = load_judge(args.judge, FULL, args.device) if args.judge else None
    if args.causal:
        causal = load_causal(args.causal, pipe)
        criteria = evaluate_causal(causal, pipe, size, judge)
    else:
        criteria = evaluate(pipe, size, judge)
    for result in criteria:
        print(result, flush=True)
        results.append(result)
    print(f"{sum(result.passed for result in results)} of {len(results)} in {time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) | {"passed": result.passed} for result in results], indent=2))
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
