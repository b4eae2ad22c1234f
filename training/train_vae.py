"""Stage 1: the causal video autoencoder, on flat scenes and clips of the small world, rendered as it goes."""

import math
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
from training.world import draw_worlds, render_worlds


def random_clips(number: int, num_frames: int, seed: int, recipe: Recipe, device: str) -> Tensor:
    """Render clips [number, 3, num_frames, 128, 128], a share of them cross-fading into another scene."""
    generator = torch.Generator().manual_seed(seed)
    before = draw_scenes(number, generator)
    if torch.rand((), generator=generator) >= recipe.changing_clips:
        return render(before.to(device), num_frames)
    after = changed_scenes(before, generator)
    frame = torch.randint(num_frames, (number,), generator=generator)
    return render_change(before.to(device), after.to(device), frame.to(device), num_frames)


class WorldPool:
    """Rendered clips of the small world on the device, from which batches draw windows; each draw renews one clip.

    Sphere tracing costs more than a training step does, so every clip serves several times.
    """

    def __init__(self, size: tuple[int, int], seed: int, recipe: Recipe, device: str) -> None:
        self.size, self.device, self.longest = (
            size,
            device,
            max(frames for _, t in recipe.curriculum for frames, _ in t),
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.clips = torch.cat([self._rendered() for _ in range(recipe.world_pool)])

    def _rendered(self) -> Tensor:
        worlds = draw_worlds(1, self.generator).to(self.device)
        return ((render_worlds(worlds, self.longest, *self.size) + 1) * 127.5).round().byte()

    def draw(self, number: int, num_frames: int) -> Tensor:
        """Clips [number, 3, num_frames, H, W] in [-1, 1]."""
        self.clips[self._below(len(self.clips))] = self._rendered()[0]
        windows = []
        for _ in range(number):
            start = self._below(self.longest - num_frames + 1)
            windows.append(self.clips[self._below(len(self.clips)), :, start : start + num_frames])
        return torch.stack(windows).float() / 127.5 - 1

    def _below(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.generator))


@dataclass(frozen=True)
class VaeLoss:
    """Reconstruction of a fresh batch: L1 + 4 MSE, with a slight pull on the latents' scale."""

    vae: AutoencoderKLWan
    recipe: Recipe
    ranks: Ranks
    device: str
    pools: tuple[WorldPool, ...]

    def __call__(self, step: int, progress: float) -> Tensor:
        turns = next(turns for until, turns in self.recipe.curriculum if progress < until)
        num_frames, number = turns[step % len(turns)]
        seed = FIRST_TRAINING_SEED + step * self.ranks.world_size + self.ranks.rank
        pool = self.recipe.pool_turns[step % len(self.recipe.pool_turns)]
        if pool is None:
            clip = random_clips(number, num_frames, seed, self.recipe, self.device)
        else:
            clip = self.pools[pool].draw(number, num_frames)
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


@torch.no_grad()
def world_psnr(vae: AutoencoderKLWan, recipe: Recipe, device: str) -> Tensor:
    """PSNR in dB of each frame index of the longest clips, over scenes of the small world that training never draws."""
    num_frames, errors = max(frames for _, turns in recipe.curriculum for frames, _ in turns), []
    for seed in range(recipe.measured_batches):
        worlds = draw_worlds(1, torch.Generator().manual_seed(seed)).to(device)
        clip = render_worlds(worlds, num_frames, *recipe.world_sizes[0])
        decoded = decode_clip(vae, encode_clip(vae, clip)).clamp(-1, 1)
        errors.append(((decoded - clip) / 2).square().mean(dim=(0, 1, 3, 4)))
    return -10 * torch.stack(errors).mean(0).log10()


def train_vae(
    output: Path,
    state: Path,
    minutes: float,
    recipe: Recipe,
    ranks: Ranks,
    device: str,
    slice_minutes: float = math.inf,
) -> None:
    """Train for `minutes` in all, at most `slice_minutes` in this call, and write `output / "vae"` in fp32."""
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
        slice_minutes=slice_minutes,
    )
    seed = FIRST_TRAINING_SEED + loop.step * ranks.world_size + ranks.rank
    pools = tuple(WorldPool(size, seed, recipe, device) for size in recipe.world_sizes)
    loop.run(VaeLoss(vae, recipe, ranks, device, pools))
    if ranks.rank == 0:
        psnr = world_psnr(vae, recipe, device)
        print(f"small world, {len(psnr)} frames: {psnr.mean():.2f} dB, worst frame index {psnr.min():.2f} dB")
        measure_latents(vae, recipe, device)
        vae.save_pretrained(output / "vae")
    ranks.wait()
