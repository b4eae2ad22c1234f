"""Stage 1: the causal video autoencoder, on flat scenes and clips of the small world, rendered as it goes."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.clip_vae import decode_clip, encode_clip
from training.loop import Call, Loop, mixed_precision
from training.models import build_vae
from training.recipe import FIRST_TRAINING_SEED, Recipe
from training.sources import ClipPool, sources_of
from training.world import draw_worlds
from training.world_render import render_worlds


@dataclass(frozen=True)
class VaeLoss:
    """Reconstruction of a batch: L1 + 4 MSE, weighted, with a slight pull on the latents' scale."""

    vae: AutoencoderKLWan
    recipe: Recipe
    device: str
    pools: tuple[ClipPool, ...]

    def __call__(self, step: int, progress: float) -> Tensor:
        turns = next(turns for until, turns in self.recipe.curriculum if progress < until)
        num_frames, number = turns[step % len(turns)]
        clip = self.pools[self.recipe.pool_turns[step % len(self.recipe.pool_turns)]].draw(number, num_frames)
        with mixed_precision(self.device):
            latents = encode_clip(self.vae, clip)
            spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
            noise = self.recipe.latent_noise * spread * torch.randn_like(latents)
            decoded = decode_clip(self.vae, latents + noise)
        weight, error = self._weight(clip), decoded.float() - clip
        return (weight * (error.abs() + 4 * error.square())).mean() + 1e-4 * latents.float().square().mean()

    def _weight(self, clip: Tensor) -> Tensor:
        """What each pixel [B, 1, T, H, W] counts, 1 on average: small solids as much as the wide sky, frame 0 more."""
        around = F.avg_pool3d(clip, (1, 9, 9), 1, (0, 4, 4), count_include_pad=False)
        weight = 1 + self.recipe.detail_weight * (clip - around).abs().amax(1, keepdim=True)
        weight[:, :, 0] *= self.recipe.first_frame_weight
        return weight / weight.mean()


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, recipe: Recipe, pools: tuple[ClipPool, ...]) -> None:
    """Write the latents' mean and spread per channel into the autoencoder's configuration."""
    batches, num_frames = [], min(33, pools[0].longest)
    for index in range(recipe.measured_batches):
        # Latent 0 of a clip is one frame and rare in long ones: 33 frames is what a segment has.
        clip = pools[recipe.pool_turns[index % len(recipe.pool_turns)]].draw(recipe.encode_batch, num_frames)
        batches.append(encode_clip(vae, clip).double().transpose(0, 1).flatten(1))
    std, mean = torch.std_mean(torch.cat(batches, 1), dim=1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def world_psnr(vae: AutoencoderKLWan, recipe: Recipe, device: str) -> tuple[Tensor, Tensor]:
    """PSNR in dB [T] of each frame index of the longest clips of unseen scenes, and the same where solids are seen."""
    num_frames, errors = max(frames for _, turns in recipe.curriculum for frames, _ in turns), []
    for seed in range(recipe.measured_batches):
        worlds = draw_worlds(1, torch.Generator().manual_seed(seed)).to(device)
        clip = render_worlds(worlds, num_frames, *recipe.world_sizes[0])
        bare = render_worlds(replace(worlds, count=torch.zeros_like(worlds.count)), num_frames, *recipe.world_sizes[0])
        solid = ((clip - bare).abs().amax(1) > 0.1).float()[0]  # [T, H, W]
        decoded = decode_clip(vae, encode_clip(vae, clip)).clamp(-1, 1)
        error = ((decoded - clip) / 2).square().mean(1)[0]
        errors.append(torch.stack([error.mean((1, 2)), (error * solid).sum((1, 2)) / solid.sum((1, 2)).clamp(min=1)]))
    everywhere, on_solids = -10 * torch.stack(errors).mean(0).log10()
    return everywhere, on_solids


def train_vae(call: Call, decoder_only: bool = False) -> Loop:
    """Train the autoencoder, and write `output / "vae"` in fp32.

    With `decoder_only`, the encoder stays, and the latents' mean and spread those of the `output / "vae"` there is: a
    transformer that was trained on its latents stays right.
    """
    recipe, device = call.recipe, call.device
    torch.manual_seed(FIRST_TRAINING_SEED + call.ranks.rank)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        # Only the number of rows varies, and that is marked; channel counts stay constants of their kernels.
        torch._dynamo.config.automatic_dynamic_shapes = False
    vae = build_vae(recipe).to(device)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    loop = Loop("vae", {"vae": vae}, call, recipe.vae_learning_rate)
    pools = tuple(ClipPool(source, loop.seed, recipe, device) for source in sources_of(recipe))
    loop.run(VaeLoss(vae, recipe, device, pools))
    if call.ranks.rank == 0:
        for where, psnr in zip(("small world", "its solids"), world_psnr(vae, recipe, device), strict=True):
            print(f"{where}, {len(psnr)} frames: {psnr.mean():.2f} dB, frame 0 {psnr[0]:.2f}, worst {psnr.min():.2f}")
        if decoder_only:
            known = AutoencoderKLWan.load_config(call.output / "vae")
            vae.register_to_config(**{name: known[name] for name in ("latents_mean", "latents_std")})
        else:
            measure_latents(vae, recipe, pools)
        vae.save_pretrained(call.output / "vae")
    call.ranks.wait()
    return loop
