"""The causal model's criteria: its first frames, those of long streams, their drift, and prompts that are switched.

Beside them, without bars, what the bidirectional model's `history` makes in the same time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from edit_ray import EditCausalWanPipeline, EditWanPipeline
from training.captions import Named, worded
from training.criteria import Result, Size, percent
from training.evaluate_world import BARS, STORY, contents_of, joined, sampled
from training.evaluate_world import SEED as WORLD_SEED
from training.judge import Verdict, background_colour, judge
from training.sampling import HISTORY, NUM_FRAMES, decode, sample_latents, stream_latents
from training.scenes import captions, changed_scenes, draw_scenes
from training.world_judge import WorldJudge, judged

SEED = 3000  # far below the training's
SWITCH_AT = 4  # chunks of the first prompt: the window is full
SWITCHED = 2  # chunks within which the new prompt is to be seen
DRIFT_FRAMES = 24  # over which a background's colour is averaged
FLAT_BARS = {"colours, one object": 95, "colours, two objects": 88, "forms": 85}
Sampler = Callable[[list[str], list[int]], Tensor]
"""Latents [B, C, T, h, w] of prompts and seeds."""


@dataclass(frozen=True)
class FlatClips:
    """What is right in the first and in the last frames of clips of flat scenes, and each clip's drift, of 255."""

    first: list[Verdict]
    last: list[Verdict]
    drift: list[float]


def flat_clips(pipe: EditWanPipeline, sampler: Sampler, objects: int, size: Size) -> FlatClips:
    """Sample prompts that name so many objects, and judge them."""
    generator = torch.Generator().manual_seed(SEED + objects)
    scenes = draw_scenes(size.samples, generator, objects)
    prompts = captions(scenes, generator)
    clips = FlatClips([], [], [])
    for start in range(0, size.samples, size.batch):
        rows = slice(start, start + size.batch)
        seeds = [SEED * objects + index for index in range(size.samples)[rows]]
        frames = decode(pipe, sampler(prompts[rows], seeds))
        clips.first.append(judge(frames[:, :, :NUM_FRAMES], scenes[rows]))
        clips.last.append(judge(frames[:, :, -NUM_FRAMES:], scenes[rows]))
        clips.drift.extend(drift_of([background_colour(part) for part in drift_parts(clip)]) for clip in frames)
    return clips


def drift_parts(clip: Tensor) -> list[Tensor]:
    """The first frames of a clip [3, T, H, W], and the others some at a time."""
    bounds = [0, *range(NUM_FRAMES, clip.shape[1] + 1, DRIFT_FRAMES)]
    return [clip[:, begin:end] for begin, end in pairwise(bounds)]


def drift_of(colours: Sequence[Tensor]) -> float:
    """How far colours [3] of 0 to 255 stray from the first one."""
    return max(float((colour - colours[0]).abs().max()) for colour in colours)


def flat_percentages(one: list[Verdict], two: list[Verdict]) -> dict[str, float]:
    """What is right, in percent, of clips of one object and of two."""
    forms = [verdict.forms[:, 0] for verdict in one] + [verdict.forms.flatten() for verdict in two]
    parts = ([verdict.colours for verdict in one], [verdict.colours for verdict in two], forms)
    return {name: percent(torch.cat(flags)) for name, flags in zip(FLAT_BARS, parts, strict=True)}


def judge_flat(pipe: EditCausalWanPipeline, size: Size) -> Iterator[Result]:
    """Streams of flat scenes: the first frames, the last ones beside them, and the drift between."""
    one, two = (flat_clips(pipe, streams(pipe, size), objects, size) for objects in (1, 2))
    first, last = flat_percentages(one.first, two.first), flat_percentages(one.last, two.last)
    for name, bar in FLAT_BARS.items():
        yield Result(f"causal: {name}, first {NUM_FRAMES} frames", first[name], bar, "%")
    for name in FLAT_BARS:
        yield Result(f"causal: {name}, lost at the end", first[name] - last[name], 10, "%", most=True)
    worst = max(*one.drift, *two.drift)
    yield Result(f"causal: background's drift over {size.stream_chunks} chunks", worst, 10, "/255", most=True)


def streams(pipe: EditCausalWanPipeline, size: Size, world: bool = False) -> Sampler:
    """Samples streams of the size's length."""
    shape = size.world_size if world else (128, 128)
    return lambda prompts, seeds: stream_latents(pipe, prompts, seeds, size.stream_chunks, shape)


def histories(pipe: EditWanPipeline, num_latents: int, num_inference_steps: int) -> Sampler:
    """Samples segments of the bidirectional model that continue one another, until they are as long."""

    def sampler(prompts: list[str], seeds: list[int]) -> Tensor:
        latents = sample_latents(pipe, prompts, seeds, num_inference_steps=num_inference_steps)
        while latents.shape[2] < num_latents:
            seeds = [seed + 100 for seed in seeds]
            following = sample_latents(pipe, prompts, seeds, latents[:, :, -HISTORY:], num_inference_steps)
            latents = torch.cat([latents, following[:, :, HISTORY:]], 2)
        return latents[:, :, :num_latents]

    return sampler


def seconds_of(sampler: Sampler, device: torch.device, size: Size) -> float:
    """What a batch of streams takes, the second time."""
    number = min(size.samples, size.batch)
    prompts = captions(draw_scenes(number, torch.Generator().manual_seed(SEED)))
    for _ in range(2):
        started = time.perf_counter()
        sampler(prompts, list(range(number)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started


def judge_history(pipe: EditCausalWanPipeline, bidirectional: EditWanPipeline, size: Size) -> Iterator[Result]:
    """The bidirectional model's `history` with as many steps as the causal model's time allows."""
    num_latents, device = size.stream_chunks * pipe.causal.chunk_size, pipe.vae.device
    seconds = seconds_of(streams(pipe, size), device, size)
    of_a_step = seconds_of(histories(bidirectional, num_latents, 1), device, size)
    steps = max(1, int(seconds / of_a_step))
    yield Result(f"history: its time at {steps} steps, to the causal model's", steps * of_a_step / seconds, None, "")
    one, two = (flat_clips(bidirectional, histories(bidirectional, num_latents, steps), n, size) for n in (1, 2))
    first, last = flat_percentages(one.first, two.first), flat_percentages(one.last, two.last)
    for where, right in (("first", first), ("last", last)):
        for name, percentage in right.items():
            yield Result(f"history: {name}, {where} {NUM_FRAMES} frames", percentage, None, "%")
    yield Result("history: background's drift", max(*one.drift, *two.drift), None, "/255")


def judge_switch(pipe: EditCausalWanPipeline, size: Size) -> Iterator[Result]:
    """Another prompt in the middle of a stream of flat scenes: its colours and background a few chunks later."""
    generator = torch.Generator().manual_seed(SEED + 3)
    before = draw_scenes(size.continuations, generator)
    after = changed_scenes(before, generator)
    prompts, others = captions(before, generator), captions(after, generator)

    def right(frames: Tensor, rows: slice) -> Tensor:
        verdict = judge(frames, after[rows])
        return verdict.colours & verdict.background

    flags = _switched(pipe, size, prompts, others, right, (128, 128))
    yield Result("causal: " + _switch_name(size), percent(flags), 80, "%")


def _switch_name(size: Size) -> str:
    return f"switched in {SWITCHED} chunks, {size.continuations} prompts"


def _switched(
    pipe: EditCausalWanPipeline,
    size: Size,
    prompts: list[str],
    others: list[str],
    right: Callable[[Tensor, slice], Tensor],
    shape: tuple[int, int],
) -> Tensor:
    """In which streams [N] the last chunk's frames are right; of `prompts` first, and then of `others`."""
    flags = []
    for start in range(0, len(prompts), size.batch):
        rows = slice(start, start + size.batch)
        seeds = [SEED * 3 + index for index in range(len(prompts))[rows]]
        chunks = SWITCH_AT + SWITCHED
        latents = stream_latents(pipe, prompts[rows], seeds, chunks, shape, switch=(SWITCH_AT, others[rows]))
        flags.append(right(decode(pipe, latents)[:, :, -4 * pipe.causal.chunk_size :], rows).cpu())
    return torch.cat(flags)


def judge_world(
    pipe: EditCausalWanPipeline, bidirectional: EditWanPipeline, world_judge: WorldJudge, size: Size
) -> Iterator[Result]:
    """Streams of the small world beside the bidirectional model's samples of the same prompts."""
    _, contents, prompts = contents_of(size.samples, WORLD_SEED + 2, 1)
    first, last = [], []
    for start in range(0, size.samples, size.batch):
        rows = slice(start, start + size.batch)
        seeds = [WORLD_SEED + index for index in range(size.samples)[rows]]
        frames = decode(pipe, streams(pipe, size, world=True)(prompts[rows], seeds))
        first.append(judged(world_judge, frames[:, :, :NUM_FRAMES], contents[rows]))
        last.append(judged(world_judge, frames[:, :, -NUM_FRAMES:], contents[rows]))
    other = sampled(bidirectional, world_judge, size).right
    for part in BARS:
        here, late = percent(joined(first, part)), percent(joined(last, part))
        yield Result(f"causal world: {part}, lost to the bidirectional", percent(other[part]) - here, 8, "%", most=True)
        yield Result(f"causal world: {part}, lost at the end", here - late, 10, "%", most=True)
    yield from judge_sky(pipe, world_judge, size)


def judge_sky(pipe: EditCausalWanPipeline, world_judge: WorldJudge, size: Size) -> Iterator[Result]:
    """The sky's drift under a still camera, and a switch to another sky."""
    _, contents, _ = contents_of(size.chains, SEED + 4, 1)
    prompts = [worded(replace(content, camera="still")) for content in contents]
    clips = decode(pipe, streams(pipe, size, world=True)(prompts, [SEED * 4 + i for i in range(size.chains)]))
    skies = (clips[:, :, :, : clips.shape[-2] // 8] + 1) * 127.5
    worst = max(drift_of([part.mean((1, 2, 3)) for part in drift_parts(sky)]) for sky in skies)
    yield Result(f"causal world: sky's drift over {size.stream_chunks} chunks", worst, 10, "/255", most=True)
    _, contents, _ = contents_of(size.continuations, SEED + 5, 1)
    before, after = (
        [worded(replace(content, sky=STORY[(index + turn) % len(STORY)])) for index, content in enumerate(contents)]
        for turn in (0, 1)
    )

    def right(frames: Tensor, rows: slice) -> Tensor:
        named = [Named(sky=STORY[(index + 1) % len(STORY)]) for index in range(size.continuations)[rows]]
        return judged(world_judge, frames, named)["sky"]

    flags = _switched(pipe, size, before, after, right, size.world_size)
    yield Result("causal world: sky " + _switch_name(size), percent(flags), 80, "%")


def evaluate_causal(
    pipe: EditCausalWanPipeline, bidirectional: EditWanPipeline, size: Size, world_judge: WorldJudge | None = None
) -> Iterator[Result]:
    """Every criterion of the causal model, as soon as it is known."""
    yield from judge_flat(pipe, size)
    yield from judge_switch(pipe, size)
    yield from judge_history(pipe, bidirectional, size)
    if world_judge:
        yield from judge_world(pipe, bidirectional, world_judge, size)
