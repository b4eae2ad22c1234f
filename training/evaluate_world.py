"""The small world's criteria: its judge, the autoencoder, samples, continuations and a storyboard."""

import random
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edit_ray import EditWanPipeline
from training.captions import Named, named, worded
from training.criteria import Result, Size, percent
from training.sampling import HISTORY, NUM_FRAMES, decode, sample_latents
from training.world import Worlds, draw_worlds
from training.world_judge import WorldJudge, judged
from training.world_render import render_worlds

SEED = 2000  # far below the training's
BARS = {"colour": 92, "form": 85, "ground": 92, "sky": 92, "motion": 75, "camera": 80}
NEGATIVE = "blurry, ugly, on a black background"  # words that it does not know, and a flat scene's
STORY = ("noon", "sunset", "night")


def contents_of(number: int, seed: int, solids: int | None = None) -> tuple[Worlds, list[Named], list[str]]:
    """Scenes of a seed, all that can be said of them, and that in words."""
    worlds, draw = draw_worlds(number, torch.Generator().manual_seed(seed), solids), random.Random(seed)
    contents = named(worlds)
    return worlds, contents, [worded(content, draw) for content in contents]


def parts_of(content: Named) -> dict[str, Hashable]:
    """What a caption names of each part, to be counted."""
    colours, forms, materials = zip(*content.solids, strict=True)
    solids = {"colour": frozenset(colours), "form": forms, "material": materials}
    return {**solids, **{part: getattr(content, part) for part in ("motion", "ground", "sky", "camera")}}


def judge_judge(judge: WorldJudge, device: str, size: Size) -> Iterator[Result]:
    """The judge on rendered clips, with their captions and with another clip's."""
    worlds, contents, _ = contents_of(size.rendered, SEED)
    right, shuffled = [], []
    for start in range(0, size.rendered, size.batch):
        rows = slice(start, start + size.batch)
        clip = render_worlds(worlds[rows].to(device), NUM_FRAMES, *size.world_size)
        right.append(judged(judge, clip, contents[rows]))
        shuffled.append(judged(judge, clip.roll(1, 0), contents[rows]))
    for part in right[0]:
        most = Counter(parts_of(content)[part] for content in contents).most_common(1)[0][1]
        yield Result(f"world: judge's {part}", percent(joined(right, part)), 97, "%")
        bar = 100 * most / size.rendered + 8
        yield Result(f"world: judge's {part}, captions shuffled", percent(joined(shuffled, part)), bar, "%", most=True)


def judge_autoencoder(pipe: EditWanPipeline, size: Size) -> Iterator[Result]:
    """PSNR on long clips."""
    worlds, _, _ = contents_of(size.long_clips, SEED + 1)
    errors = []
    for row in range(size.long_clips):
        clip = render_worlds(worlds[row : row + 1].to(pipe.vae.device), 129, *size.world_size)
        with torch.no_grad():
            decoded = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample
        errors.append(((decoded - clip) / 2).square().mean((0, 1, 3, 4)))
    psnr = -10 * torch.stack(errors).mean(0).log10()
    yield Result(f"world: VAE PSNR, {size.long_clips} clips of 129 frames, mean", psnr.mean().item(), 31, "dB")
    yield Result("world: VAE PSNR, worst frame index of 129", psnr.min().item(), 29.5, "dB")


def joined(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    """One part's flags over all batches."""
    return torch.cat([part[name] for part in parts])


def extended(
    pipe: EditWanPipeline,
    size: Size,
    prompts: list[str],
    seed: int,
    latents: Tensor | None = None,
    negative: str | None = None,
) -> Tensor:
    """Latents of a segment of each prompt, or of `latents` and a segment more."""
    following = sample_latents(
        pipe,
        prompts,
        [seed + index for index in range(len(prompts))],
        None if latents is None else latents[:, :, -HISTORY:],
        size.world_steps,
        negative_prompts=[negative] * len(prompts) if negative else None,
        size=size.world_size,
    )
    return following if latents is None else torch.cat([latents, following[:, :, HISTORY:]], 2)


@dataclass(frozen=True)
class Samples:
    """Samples from text: prompts, latents, and what is right of them, part by part."""

    prompts: list[str]
    latents: Tensor
    right: dict[str, Tensor]


def sampled(
    pipe: EditWanPipeline, judge: WorldJudge, size: Size, solids: int = 1, negative: str | None = None
) -> Samples:
    """Sample and judge prompts that name so many solids."""
    _, contents, prompts = contents_of(size.samples, SEED + 1 + solids, solids)
    latents, right = [], []
    for start in range(0, size.samples, size.batch):
        rows = slice(start, start + size.batch)
        latents.append(extended(pipe, size, prompts[rows], SEED * solids + start, negative=negative))
        right.append(judged(judge, decode(pipe, latents[-1]), contents[rows]))
    return Samples(prompts, torch.cat(latents), {part: joined(right, part) for part in right[0]})


def judge_samples(pipe: EditWanPipeline, judge: WorldJudge, size: Size, one: Samples) -> Iterator[Result]:
    """Samples over the clip, of two solids, at 8 steps, and with a negative prompt."""
    for part, bar in BARS.items():
        yield Result(f"world: {part}, one solid", percent(one.right[part]), bar, "%")
    two = sampled(pipe, judge, size, solids=2)
    yield Result("world: colours and forms, two solids", percent(two.right["colour"] & two.right["form"]), 75, "%")
    fewer, negative = (
        sampled(pipe, judge, replace(size, world_steps=8)),
        sampled(pipe, judge, size, negative=NEGATIVE),
    )
    for name, other, bar in (("at 8 steps", fewer, 12), ("with a negative prompt", negative, 6)):
        lost = max(percent(one.right[part]) - percent(other.right[part]) for part in BARS)
        yield Result(f"world: largest loss of a part {name}", lost, bar, "%", most=True)


def judge_joins(pipe: EditWanPipeline, size: Size, one: Samples) -> Iterator[Result]:
    """The step over the join against the mean step inside the clips."""
    number = min(size.continuations, size.batch)
    latents = extended(pipe, size, one.prompts[:number], SEED * 3, one.latents[:number])
    steps = decode(pipe, latents).diff(dim=2).abs().mean((1, 3, 4))  # [B, T - 1]
    join = NUM_FRAMES - 1
    inside = torch.cat([steps[:, :join], steps[:, join + 1 :]], 1).mean(1)
    yield Result(f"world: join to interior, {number} clips", (steps[:, join] / inside).mean().item(), 1.25, "", True)


def judge_drift(pipe: EditWanPipeline, size: Size) -> Iterator[Result]:
    """How far the mean colour of the sky strays from the first segment's under a still camera, worst chain."""
    _, contents, _ = contents_of(size.chains, SEED + 5, 1)
    prompts = [worded(replace(content, camera="still")) for content in contents]
    latents = None
    for segment in range(size.segments):
        latents = extended(pipe, size, prompts, SEED * 4 + 100 * segment, latents)
    assert latents is not None
    worst = 0.0
    for chain in latents:
        clip = (decode(pipe, chain[None])[0] + 1) * 127.5
        sky = clip[:, :, : clip.shape[-2] // 8].mean((2, 3))  # [3, T]
        segments = sky[:, NUM_FRAMES:].unflatten(1, (size.segments - 1, -1)).mean(2)
        worst = max(worst, (segments - sky[:, :NUM_FRAMES].mean(1, keepdim=True)).abs().max().item())
    yield Result(f"world: sky's drift over {size.segments} segments", worst, 10, "/255", most=True)


def judge_storyboard(pipe: EditWanPipeline, judge: WorldJudge, size: Size) -> Iterator[Result]:
    """Noon, sunset, night over one shot: the sky that the judge sees at each segment's end."""
    number = min(size.continuations, size.batch)
    _, contents, _ = contents_of(number, SEED + 6, 1)
    right, latents = [], None
    for segment, sky in enumerate(STORY):
        prompts = [worded(replace(content, sky=sky)) for content in contents]
        latents = extended(pipe, size, prompts, SEED * 5 + 100 * segment, latents)
        right.append(judged(judge, decode(pipe, latents)[:, :, -17:], [Named(sky=sky)] * number)["sky"])
    yield Result(f"world: sky of {len(STORY)} segments of a storyboard", percent(torch.cat(right)), 85, "%")


def evaluate_world(pipe: EditWanPipeline, judge: WorldJudge, size: Size) -> Iterator[Result]:
    """Every criterion of the small world, as soon as it is known."""
    yield from judge_judge(judge, str(pipe.vae.device), size)
    yield from judge_autoencoder(pipe, size)
    one = sampled(pipe, judge, size)
    yield from judge_samples(pipe, judge, size, one)
    yield from judge_joins(pipe, size, one)
    yield from judge_drift(pipe, size)
    yield from judge_storyboard(pipe, judge, size)
