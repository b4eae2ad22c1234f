"""The whole-clip autoencoder of the training equals the stock chunked one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from training.clip_vae import decode_clip, encode_clip
from training.models import build_vae
from training.recipe import SMOKE
from training.scenes import draw_scenes, render

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = build_vae(replace(SMOKE, vae_z_dim=4))
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # all ones at the start, which would hide a gamma that is not applied
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.double()


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_clips_are_encoded_and_decoded_as_by_stock(vae: AutoencoderKLWan, num_frames: int) -> None:
    near = {"rtol": 1e-9, "atol": 1e-10}
    clip = torch.rand(2, 3, num_frames, 8, 16, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(encode_clip(vae, clip), vae.encode(clip).latent_dist.mode(), **near)
    latents = torch.randn(2, 4, 1 + num_frames // 4, 1, 2, dtype=torch.float64)
    decoded = decode_clip(vae, latents)
    assert decoded.shape == (2, 3, num_frames, 8, 16)
    torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(latents).sample, **near)


def test_the_small_world_s_autoencoder_keeps_flat_scenes_and_gives_latents_of_spread_one() -> None:
    vae = AutoencoderKLWan.from_pretrained(ROOT / "training" / "world_vae", torch_dtype=torch.float32)
    clip = render(draw_scenes(2, torch.Generator().manual_seed(5)), 17)
    with torch.no_grad():
        latents = encode_clip(vae, clip)
        decoded = decode_clip(vae, latents)
    psnr = -10 * ((decoded - clip) / 2).square().mean().log10()
    assert psnr > 32
    mean, std = (
        torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    assert 0.7 < ((latents - mean) / std).std() < 1.4
