"""Decoding a stream in pieces gives the bits of decoding it at once, also after the state was lost."""

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from edit_ray.engine.decode import StreamingDecoder, to_uint8
from edit_ray.engine.model_info import lookback_latents
from edit_ray.testing import random_vae
from tests.decoding import decode_at_once

VAES = {
    "wan21": {},
    "wan21-two-residual-blocks": {"num_res_blocks": 2},
    "three-levels": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "scale_factor_spatial": 4},
    "time-first": {"temperal_downsample": [True, True, False]},
    "wan22": {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": 16,
    },
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=VAES)
def vae(request):
    torch.manual_seed(0)
    return random_vae(**VAES[request.param])


def noise(frames: int, size: int = 4) -> torch.Tensor:
    return torch.randn(1, 4, frames, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("cuts", [[9], [1, 8], [3, 1, 5], [1] * 9], ids=str)
def test_any_cut_gives_the_same_bits(vae, cuts):
    latents = noise(9)
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(part) for part in latents.split(cuts, dim=2)]
    assert [piece.shape[2] for piece in pieces] == [4 * cut - 3 * (i == 0) for i, cut in enumerate(cuts)]
    assert decoder.position == 9
    assert torch.equal(torch.cat(pieces, dim=2), decode_at_once(vae, latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frames_are_rounded_as_diffusers_frames_are(dtype):
    vae = random_vae().to(dtype)
    video = StreamingDecoder(vae).decode(noise(3) * 3)
    frames = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0]
    ours = to_uint8(video)
    assert ours.shape == (9, 32, 32, 3)
    assert ours.dtype == torch.uint8
    assert np.array_equal(ours.numpy(), (frames * 255).round().astype(np.uint8))
    assert len(ours.unique()) > 20


def test_uint8_reaches_both_ends():
    video = torch.tensor([-1.0, 1.0, 0.0]).reshape(1, 3, 1, 1, 1)
    assert to_uint8(video).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    ("num_res_blocks", "temperal_downsample", "lookback"),
    [(2, [False, True, True], 41), (1, [False, True, True], 33), (2, [False, False, False], 63)],
)
def test_lookback_is_the_reach_of_the_convolutions(num_res_blocks, temperal_downsample, lookback):
    config = {"num_res_blocks": num_res_blocks, "temperal_downsample": temperal_downsample}
    assert lookback_latents(config) == lookback


@pytest.mark.parametrize(
    "vae", [pytest.param(name, marks=pytest.mark.slow if name != "wan22" else ()) for name in VAES], indirect=True
)
def test_lookback_is_enough_and_a_fourth_of_it_is_not(vae):
    lookback = lookback_latents(vae.config)
    position = lookback + 2
    latents = noise(position + 2)
    whole = decode_at_once(vae, latents)[:, :, 1 + 4 * (position - 1) :]

    decoder = StreamingDecoder(vae)
    decoder.rebuild(latents[:, :, :position], position)
    assert decoder.position == position
    assert torch.equal(decoder.decode(latents[:, :, position:]), whole)

    decoder.lookback = lookback // 4
    decoder.rebuild(latents[:, :, :position], position)
    assert (decoder.decode(latents[:, :, position:]) - whole).abs().max() > 1e-6


@pytest.mark.one_in(4)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_short_stream_is_decoded_again_from_its_first_latent(vae, position):
    latents = noise(position + 2)
    decoder = StreamingDecoder(vae)
    decoder.decode(noise(2) + 1)
    decoder.rebuild(latents[:, :, :position], position)
    emitted = 0 if position == 0 else 4 * position - 3
    assert torch.equal(decoder.decode(latents[:, :, position:]), decode_at_once(vae, latents)[:, :, emitted:])


def test_too_few_latents_do_not_rebuild():
    decoder = StreamingDecoder(random_vae())
    with pytest.raises(ValueError, match="4 latents do not rebuild the decoder at latent 60; it takes 33"):
        decoder.rebuild(noise(4), 60)
    with pytest.raises(ValueError, match="it takes 5"):
        decoder.rebuild(noise(4), 5)


def test_reset_begins_a_new_stream(vae):
    decoder = StreamingDecoder(vae)
    first = decoder.decode(noise(3))
    assert not torch.equal(decoder.decode(noise(3))[:, :, -9:], first)
    decoder.reset()
    assert torch.equal(decoder.decode(noise(3)), first)


def test_an_error_leaves_no_half_state():
    decoder = StreamingDecoder(random_vae())
    decoder.decode(noise(2))
    with pytest.raises(RuntimeError):
        decoder.decode(torch.zeros(1, 5, 1, 4, 4))
    assert decoder.position == 0
    assert decoder.decode(noise(2)).shape[2] == 5


def test_two_streams_share_a_vae_without_meeting():
    vae = random_vae()
    one, other = StreamingDecoder(vae), StreamingDecoder(vae)
    latents = noise(4)
    alone = StreamingDecoder(vae).decode(latents)
    parts = []
    for part in latents.split(1, dim=2):
        parts.append(one.decode(part))
        other.decode(-part)
    assert torch.equal(torch.cat(parts, dim=2), alone)
