"""Frames back to latents."""

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.engine.decode import StreamingDecoder
from edit_ray.engine.model_info import lookback_latents
from edit_ray.engine.vae_stream import encode_video
from edit_ray.testing import random_vae

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (9, 3)])
def test_a_clip_has_a_latent_for_its_first_frame_and_one_for_each_four(frames, latents):
    encoded = encode_video(random_vae().to(torch.bfloat16), torch.zeros(1, 3, frames, 32, 48))
    assert encoded.shape == (1, 4, latents, 4, 6)
    assert encoded.dtype == torch.float32


@pytest.mark.parametrize("frames", [2, 8])
def test_another_number_of_frames_is_refused(frames):
    with pytest.raises(ValueError, match=f"{frames} frames cannot be encoded; it takes 4k\\+1"):
        encode_video(random_vae(), torch.zeros(1, 3, frames, 32, 32))


def test_the_embedded_model_finds_its_own_frames_again():
    """Trained weights: what they decoded they encode to almost the same latents, and its decoder looks back 33."""
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan")
    assert lookback_latents(pipe.vae.config) == 33
    video = torch.full((1, 3, 5, 64, 64), -0.9)
    video[:, 0, :, 20:40, 20:40] = 0.9  # a red square on black
    again = StreamingDecoder(pipe.vae).decode(encode_video(pipe.vae, video))
    assert (again - video).abs().mean() < 0.1
