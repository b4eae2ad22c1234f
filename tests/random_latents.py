"""A fresh transformer of the training that learns random latents: its loop and its loss."""

from pathlib import Path

import torch

from training.latent_clips import LatentClips
from training.loop import Call, Loop
from training.models import CAPTION_TOKENS, build_text_encoder, build_tokenizer, build_transformer
from training.recipe import Recipe
from training.train_transformer import FlowLoss, flow_loss, matrices_of


def loop_and_loss(
    folder: Path, recipe: Recipe, sizes: tuple[tuple[int, int], ...], device: str
) -> tuple[Loop, FlowLoss]:
    """A fresh model, and random clips of these sizes."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    transformer, text_encoder = build_transformer(recipe), build_text_encoder(recipe, tokenizer)
    transformer.to(device).train()
    text_encoder.to(device).train()
    call = Call(folder, folder, recipe, minutes=10, device=device)
    modules = {"transformer": transformer, "text_encoder": text_encoder}
    loop = Loop("transformer", modules, call, recipe.learning_rate, matrices_of(transformer))
    ids = torch.randint(5, len(tokenizer), (8, CAPTION_TOKENS), device=device)
    ids[:, 20:] = tokenizer.pad_token_id
    change = torch.full((8,), max(recipe.history_lengths) + 1, device=device)
    shapes = ((8, recipe.clip_latents, recipe.vae_z_dim, *size) for size in sizes)
    clips = tuple(LatentClips(torch.randn(shape, device=device).half(), ids, ids, change) for shape in shapes)
    return loop, flow_loss(clips, transformer, text_encoder, tokenizer, recipe)
