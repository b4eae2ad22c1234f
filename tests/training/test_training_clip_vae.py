"""The whole-clip autoencoder of the training equals the stock chunked one."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan

from training.clip_vae import decode_clip, encode_clip
from training.models import build_vae
from training.recipe import SMOKE


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
