"""Stage 1: the causal video autoencoder, on clips rendered as it goes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.clip_vae import decode_clip, encode_clip
from training.loop import Loop, Ranks, mixed_precision
from training.models import build_vae
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.scenes import changed_scenes, draw_scenes, render, render_change


def random_clips(number: int, num_frames: int, seed: int, recipe: Recipe, device: str) -> Tensor:
    """Render clips [number, 3, num_frames, 128, 128], a share of them cross-fading into another scene."""
    generator = torch.Generator().manual_seed(seed)
    before = draw_scenes(number, generator)
    if torch.rand((), generator=generator) >= recipe.changing_clips:
        return render(before.to(device), num_frames)
    after = changed_scenes(before, generator)
    frame = torch.randint(num_frames, (number,), generator=generator)
    return render_change(before.to(device), after.to(device), frame.to(device), num_frames)


@dataclass(frozen=True)
class VaeLoss:
    """Reconstruction of a fresh batch: L1 + 4 MSE, with a slight pull on the latents' scale."""

    vae: AutoencoderKLWan
    recipe: Recipe
    ranks: Ranks
    device: str

    def __call__(self, step: int, progress: float) -> Tensor:
        turns = next(turns for until, turns in self.recipe.curriculum if progress < until)
        num_frames, number = turns[step % len(turns)]
        seed = FIRST_TRAINING_SEED + step * self.ranks.world_size + self.ranks.rank
        clip = random_clips(number, num_frames, seed, self.recipe, self.device)
        with mixed_precision(self.device):
            latents = encode_clip(self.vae, clip)
            spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
            noise = self.recipe.latent_noise * spread * torch.randn_like(latents)
            decoded = decode_clip(self.vae, latents + noise)
        error = decoded.float() - clip
        return error.abs().mean() + 4 * error.square().mean() + 1e-4 * latents.float().square().mean()


def measure_latents(vae: AutoencoderKLWan, recipe: Recipe, device: str) -> None:
    """Write the latents' mean and spread per channel into the autoencoder's configuration."""
    batches = []
    with torch.no_grad():
        for index in range(recipe.measured_batches):
            # Latent 0 of a clip is one frame and rare in long ones: 33 frames is what a segment has.
            clip = random_clips(recipe.encode_batch, 33, FIRST_TRAINING_SEED - 1 - index, recipe, device)
            batches.append(encode_clip(vae, clip).double())
    latents = torch.cat(batches)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def train_vae(output: Path, state: Path, minutes: float, recipe: Recipe, ranks: Ranks, device: str) -> None:
    """Train for `minutes` in all and write `output / "vae"` in fp32."""
    torch.manual_seed(FIRST_TRAINING_SEED + ranks.rank)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        # Only the number of rows varies, and that is marked; channel counts stay constants of their kernels.
        torch._dynamo.config.automatic_dynamic_shapes = False
    vae = build_vae(recipe).to(device)
    loop = Loop(
        "vae",
        {"vae": vae},
        recipe=recipe,
        learning_rate=recipe.vae_learning_rate,
        betas=(0.9, 0.99),
        minutes=minutes,
        state=state,
        ranks=ranks,
    )
    loop.run(VaeLoss(vae, recipe, ranks, device))
    if ranks.rank == 0:
        measure_latents(vae, recipe, device)
        vae.save_pretrained(output / "vae")
    ranks.wait()
