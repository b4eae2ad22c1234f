"""Stage 3: the transformer turned causal, by teacher forcing, and then few-step, by consistency distillation.

Teacher forcing is flow matching on chunks that see the clean chunks before them, under windows and sinks that vary.
Distillation follows its flow, with guidance, from one noise level to the next: the student's clean chunk from the
higher one is to be that of its averaged weights from the lower one. Contexts are worn, against drift.

Sources: Y. Song et al., "Consistency Models" (2023); T. Yin et al., "From Slow Bidirectional to Fast Autoregressive
Video Diffusion Models" (2024), on chunks as the unit of both.
"""

import copy
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from training.causal_forward import ChunkedTransformer, ChunkWindow
from training.latent_clips import CaptionEncoder, LatentClips, encode_clips, noise_levels, shifted, worn
from training.loop import Call, Loop, mixed_precision
from training.models import build_tokenizer, compile_blocks, save_causal_transformer
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.sources import sources_of


@dataclass(frozen=True)
class ChunkBatch:
    """Latents `x0` [B, C, T, h, w] of whole chunks in fp32, captions' `ids` [B, 48], what each latent counts [B, T].

    Clips that change have the caption of the later scene, as a stream's K/V after `recache`; what comes before the
    change does not count.
    """

    x0: Tensor
    ids: Tensor
    weight: Tensor
    window: ChunkWindow

    def mean(self, error: Tensor) -> Tensor:
        """The weighted mean of an error [B, C, T, h, w]."""
        return (error.mean(dim=(1, 3, 4)) * self.weight).sum() / self.weight.sum()


def draw_batch(clips: tuple[LatentClips, ...], recipe: Recipe, step: int) -> ChunkBatch:
    """The batch of a step: windows and sources take turns, and so shapes are few."""
    source, window, sink = recipe.causal_turns[step % len(recipe.causal_turns)]
    of_source, size = clips[source], recipe.chunk_size
    index, changes = of_source.draw(recipe.causal_batch, recipe.causal_changes)
    x0 = of_source.latents[index].transpose(1, 2).float()
    ids = torch.where(changes[:, None], of_source.changed_ids[index], of_source.ids[index])
    later = torch.arange(x0.shape[2], device=ids.device) >= of_source.change[index][:, None]
    weight = (later | ~changes[:, None]).float()
    weight[:, 0] *= recipe.first_frame_weight
    return ChunkBatch(x0, ids, weight, ChunkWindow(window // size, sink // size))


def spread(values: Tensor, x0: Tensor) -> Tensor:
    """Values [B, n] of chunks as those of their latents [B, 1, T, 1, 1]."""
    return values.repeat_interleave(x0.shape[2] // values.shape[1], dim=1)[:, None, :, None, None]


@dataclass(frozen=True)
class ForcingLoss:
    """Teacher forcing: x_t = (1 - s) x_0 + s noise, target noise - x_0, a noise level s for each chunk."""

    clips: tuple[LatentClips, ...]
    transformer: ChunkedTransformer
    captions: CaptionEncoder
    recipe: Recipe

    def __call__(self, step: int, progress: float) -> Tensor:
        batch, recipe = draw_batch(self.clips, self.recipe, step), self.recipe
        with torch.no_grad(), mixed_precision(batch.x0.device.type):
            text = self.captions(batch.ids, recipe.empty_captions)
        shape = len(batch.ids), batch.x0.shape[2] // recipe.chunk_size
        levels = noise_levels(shape[0] * shape[1], recipe, batch.x0.device)
        sigma = levels[torch.randperm(len(levels), device=levels.device)].view(shape)
        noise = torch.randn_like(batch.x0)
        noised = torch.lerp(batch.x0, noise, spread(sigma, batch.x0))
        flow = self.transformer(worn(batch.x0, recipe), noised, sigma, text, batch.window)
        return batch.mean((flow - (noise - batch.x0)).square())


@dataclass(frozen=True)
class ConsistencyLoss:
    """Consistency along the teacher's guided flow: x_0 from a level equals that of the averaged weights from the next.

    `levels` fall from 1 to 0. Teacher and average see a clean context, the student a worn one, or chunks that it would
    make itself: what it is to make does not drift with what it sees.
    """

    clips: tuple[LatentClips, ...]
    student: ChunkedTransformer
    average: ChunkedTransformer
    teacher: ChunkedTransformer
    captions: CaptionEncoder
    recipe: Recipe
    levels: Tensor

    def __call__(self, step: int, progress: float) -> Tensor:
        batch = draw_batch(self.clips, self.recipe, step)
        x0, window = batch.x0, batch.window
        number = len(x0), x0.shape[2] // self.recipe.chunk_size
        index = torch.randint(len(self.levels) - 1, number, device=x0.device)
        sigma, lower = self.levels[index], self.levels[index + 1]
        noised = torch.lerp(x0, torch.randn_like(x0), spread(sigma, x0))
        with torch.no_grad():
            with mixed_precision(x0.device.type):
                text, nothing = self.captions(batch.ids, empty=0.0), self.captions.empty(batch.ids)
            uncond = self.teacher(x0, noised, sigma, nothing, window)
            cond = self.teacher(x0, noised, sigma, text, window)
            flow = uncond + self.recipe.causal_guidance * (cond - uncond)
            nearer = noised + spread(lower - sigma, x0) * flow
            target = nearer - spread(lower, x0) * self.average(x0, nearer, lower, text, window)
        own = (torch.rand_like(sigma[:, :1]) < self.recipe.recycled) & (lower < self.recipe.recycled_below)
        seen = torch.where(spread(own, x0), target, worn(x0, self.recipe))
        clean = noised - spread(sigma, x0) * self.student(seen, noised, sigma, text, window)
        return batch.mean((clean - target).square())


def consistency_levels(recipe: Recipe) -> Tensor:
    """The noise levels [levels + 1] from 1 to 0, evenly spread and then shifted; the sampler's steps are among them."""
    return shifted(torch.arange(recipe.causal_levels, -1, -1) / recipe.causal_levels, recipe.causal_shift)


def train_causal(call: Call) -> Loop:
    """Turn `output / "transformer"` causal, and write it and its options into `output / "causal"` in fp16.

    Two loops share the minutes: the teacher's, whose averaged weights the student begins with, and the student's. A
    call continues the one that has not spent its share; returns that loop.
    """
    recipe, ranks, output, share = call.recipe, call.ranks, call.output, call.recipe.forcing_share
    torch.manual_seed(FIRST_TRAINING_SEED + ranks.rank)
    teacher = WanTransformer3DModel.from_pretrained(output / "transformer", dtype=torch.float32).to(call.device)
    student = copy.deepcopy(teacher)
    first = replace(call, minutes=share * call.minutes)
    second = replace(first, minutes=call.minutes - first.minutes, recipe=replace(recipe, ema_decay=recipe.causal_decay))
    forcing = Loop("causal_teacher", {"transformer": teacher}, first, recipe.forcing_learning_rate)
    distilling = Loop("causal", {"transformer": student}, second, recipe.causal_learning_rate)
    seed = forcing.seed + distilling.step * ranks.world_size
    torch.manual_seed(seed)
    clips, captions = _encoded(call, seed)

    chunked_teacher, before = _chunked(teacher, recipe), forcing.seconds
    forcing.run(ForcingLoss(clips, chunked_teacher, captions, recipe))
    if forcing.seconds < forcing.budget_s:
        return forcing
    forcing.compact()
    teacher.requires_grad_(False)
    weights = [parameter.half() for parameter in teacher.parameters()]  # as precise as later calls find them
    fresh = (distilling.parameters, distilling.averaged) if distilling.step == 0 else ()
    with torch.no_grad():
        for tensors in (forcing.parameters, *fresh):
            torch._foreach_copy_(tensors, weights)
    average = copy.deepcopy(student).requires_grad_(False)
    for parameter, averaged in zip(average.parameters(), distilling.averaged, strict=True):
        parameter.data = averaged  # which the loop updates in place
    chunked = _chunked(student, recipe), _chunked(average, recipe), chunked_teacher
    levels = consistency_levels(recipe).to(call.device)
    distilling.slice_s -= forcing.seconds - before
    distilling.run(ConsistencyLoss(clips, *chunked, captions, recipe, levels))
    if ranks.rank == 0:
        save_causal_transformer(output, student, recipe)
    ranks.wait()
    return distilling


def _chunked(transformer: WanTransformer3DModel, recipe: Recipe) -> ChunkedTransformer:
    """The transformer over chunks, compiled on a GPU."""
    chunked = ChunkedTransformer(transformer, recipe.chunk_size)
    compile_blocks(transformer)
    return chunked


def _encoded(call: Call, seed: int) -> tuple[tuple[LatentClips, ...], CaptionEncoder]:
    """Clips of whole chunks by the finished autoencoder, and the finished text encoder."""
    recipe = replace(call.recipe, clip_latents=call.recipe.causal_clip_latents)
    vae = AutoencoderKLWan.from_pretrained(call.output / "vae", dtype=torch.float32).to(call.device)
    text_encoder = UMT5EncoderModel.from_pretrained(call.output / "text_encoder", dtype=torch.float32).to(call.device)
    sources = zip(sources_of(recipe), recipe.causal_clips, strict=True)
    clips = tuple(
        encode_clips(vae, source, number, recipe, seed, call.device, recipe.chunk_size) for source, number in sources
    )
    return clips, CaptionEncoder(text_encoder.eval(), build_tokenizer(), recipe)
