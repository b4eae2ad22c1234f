"""What the two causal losses teach: a model that has learned them makes its scenes as a stream, in few steps.

Slow: `make proof` runs it. The scenes are constant latents, one for each caption, with either sign: which sign it is, a
stream's first chunk settles by its noise, and later chunks can know only from the K/V of those before.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor

from edit_ray import EditCausalWanPipeline
from edit_ray.engine.causal_options import CausalOptions
from edit_ray.testing.wan import random_vae
from tests.calls import quiet
from training.causal_forward import ChunkedTransformer
from training.latent_clips import CaptionEncoder, LatentClips
from training.models import CAPTION_TOKENS, build_text_encoder, build_tokenizer, build_transformer
from training.recipe import SMOKE
from training.sampling import stream_latents
from training.train_causal import ConsistencyLoss, ForcingLoss, consistency_levels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
RECIPE = replace(
    SMOKE,
    vae_z_dim=4,
    layers=2,
    ffn_dim=128,
    causal_turns=((0, 6, 3), (0, 9, 3)),
    causal_batch=8,
    causal_guidance=1.0,
    causal_levels=8,
    unknown_captions=0.0,
    unknown_words=0.0,
)
PROMPTS = ["a red circle", "a blue square"]
WINDOW = {"window": 9, "sink": 3}
CHUNKS, STREAMS = 4, 12  # the last chunk's window has moved on


def clips_of(scenes: Tensor) -> tuple[LatentClips]:
    """Clips of both scenes with both signs; the last quarter changes into the other scene."""
    padded = {"padding": "max_length", "max_length": CAPTION_TOKENS, "return_tensors": "pt"}
    ids = build_tokenizer()(PROMPTS * 4, **padded).input_ids
    sign = torch.tensor([1, 1, -1, -1, 1, 1, -1, -1]).view(-1, 1, 1, 1, 1)
    latents = sign * scenes[:, None].expand(-1, 3 * CHUNKS, -1, -1, -1).repeat(4, 1, 1, 1, 1)
    latents[6:, 6:] = -scenes.flip(0)[:, None]
    return (LatentClips(latents, ids, ids.roll(1, 0), torch.full((8,), 6)),)


def train(loss: Callable, model: WanTransformer3DModel, steps: int, averaged: list[Tensor]) -> None:
    """Take so many of the loop's steps."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.95 * step / steps)
        optimizer.zero_grad()
        loss(step, step / steps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averaged, [parameter.data for parameter in parameters], 0.1)


def errors_of(pipe: EditCausalWanPipeline, scenes: Tensor, timesteps: list[float]) -> tuple[list[float], float]:
    """Each chunk's mean squared error, in shares of its scene's, and in how many chunks a stream keeps its sign."""
    pipe.causal = CausalOptions(**WINDOW, timesteps=timesteps)
    latents = stream_latents(pipe, PROMPTS * (STREAMS // 2), list(range(STREAMS)), CHUNKS, (16, 16))
    scene = scenes.repeat(STREAMS // 2, 1, 1, 1)[:, :, None]
    signs = torch.stack([(chunk * scene).sum((1, 2, 3, 4)).sign() for chunk in latents.split(3, 2)])
    off = latents - signs.repeat_interleave(3, 0).T[:, None, :, None, None] * scene
    share = off.square().mean((0, 1, 3, 4)) / scene.square().mean()
    return share.view(CHUNKS, 3).mean(1).tolist(), (signs == signs[0]).float().mean().item()


def test_scenes_are_learned_and_then_made_in_fewer_steps() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(RECIPE, tokenizer).requires_grad_(False)
    captions, scenes = CaptionEncoder(text_encoder, tokenizer, RECIPE), torch.randn(2, 4, 2, 2)
    clips, student = clips_of(scenes), build_transformer(RECIPE)
    average = copy.deepcopy(student).requires_grad_(False)
    averaged = [parameter.data for parameter in average.parameters()]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": random_vae()}
    sampled = build_transformer(RECIPE)
    pipe = quiet(EditCausalWanPipeline(**parts, scheduler=UniPCMultistepScheduler(**flow), transformer=sampled))

    train(ForcingLoss(clips, ChunkedTransformer(student, 3), captions, RECIPE), student, 150, averaged)
    student.load_state_dict(average.state_dict())
    sampled.load_state_dict(average.state_dict())
    before, _ = errors_of(pipe, scenes, [1000.0])

    teacher = copy.deepcopy(average)
    chunked = (ChunkedTransformer(model, 3) for model in (student, average, teacher))
    loss = ConsistencyLoss(clips, *chunked, captions, RECIPE, consistency_levels(RECIPE))
    train(loss, student, 120, averaged)
    sampled.load_state_dict(average.state_dict())
    after, _ = errors_of(pipe, scenes, [1000.0])
    four, kept = errors_of(pipe, scenes, CausalOptions().timesteps)
    print(f"in one step {before} before, {after} after; in four {four}, {kept:.0%} keep their sign")
    assert sum(after) <= 0.75 * sum(before)
    assert sum(four) / CHUNKS <= 0.2
    assert kept >= 0.9
