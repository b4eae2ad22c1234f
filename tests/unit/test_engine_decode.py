"""Decoding a stream in pieces gives the bits of decoding it at once, whole or in tiles, also after a lost state."""

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from edit_ray import EditWanPipeline
from edit_ray.engine.decode import StreamingDecoder, denormalise, to_uint8
from edit_ray.engine.model_info import lookback_latents
from edit_ray.engine.vae_stream import RunStream, encode_video
from edit_ray.testing import random_vae
from tests.decoding import decode_at_once

VAES = {
    "wan21": {},
    "wan21-two-residual-blocks": {"num_res_blocks": 2},
    "three-levels": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "scale_factor_spatial": 4},
    "time-first": {"temperal_downsample": [True, True, False]},
    "wan22": {
        **{"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        **{"temperal_downsample": [False, True, True], "scale_factor_spatial": 16},
    },
}
TILE, STRIDE = 3, 2  # latents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vae(request):
    torch.manual_seed(0)
    return random_vae(**VAES[getattr(request, "param", "wan21")])


every_vae = pytest.mark.parametrize("vae", VAES, indirect=True)


def noise(frames: int, height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.randn(1, 4, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.one_in(4)
@every_vae
@pytest.mark.parametrize("cuts", [[9], [1, 8], [3, 1, 5], [1] * 9], ids=str)
def test_any_cut_gives_the_same_bits_beside_another_stream_and_in_a_new_one(vae, cuts):
    latents, decoder, other = noise(9), StreamingDecoder(vae), StreamingDecoder(vae)
    whole = decode_at_once(vae, latents)
    for _ in range(2):
        pieces = []
        for part in latents.split(cuts, dim=2):
            pieces.append(decoder.decode(part))
            other.decode(-part)
        assert [piece.shape[2] for piece in pieces] == [4 * cut - 3 * (i == 0) for i, cut in enumerate(cuts)]
        assert decoder.position == 9
        assert torch.equal(torch.cat(pieces, dim=2), whole)
        decoder.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frames_are_rounded_as_diffusers_frames_are(vae, dtype):
    video = StreamingDecoder(vae.to(dtype)).decode(noise(3) * 3)
    frames = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0]
    ours = to_uint8(video)
    assert (ours.shape, ours.dtype) == ((9, 32, 32, 3), torch.uint8)
    assert np.array_equal(ours.numpy(), (frames * 255).round().astype(np.uint8))
    assert len(ours.unique()) > 20
    assert to_uint8(torch.tensor([-1.0, 1.0, 0.0]).reshape(1, 3, 1, 1, 1)).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    "vae", [pytest.param(name, marks=pytest.mark.slow if name != "wan22" else ()) for name in VAES], indirect=True
)
def test_lookback_is_enough_and_a_fourth_of_it_is_not(vae):
    lookback = lookback_latents(vae.config)
    position = lookback + 2
    latents = noise(position + 1, 2, 2)
    whole = decode_at_once(vae, latents)[:, :, 1 + 4 * (position - 1) :]

    decoder = StreamingDecoder(vae)
    decoder.rebuild(latents[:, :, :position], position)
    assert decoder.position == position
    assert torch.equal(decoder.decode(latents[:, :, position:]), whole)

    decoder.lookback = lookback // 4
    decoder.rebuild(latents[:, :, :position], position)
    assert (decoder.decode(latents[:, :, position:]) - whole).abs().max() > 1e-6


@pytest.mark.one_in(4)
@every_vae
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_short_stream_is_decoded_again_from_its_first_latent(vae, position):
    latents = noise(position + 2)
    decoder = StreamingDecoder(vae)
    decoder.decode(noise(2) + 1)
    decoder.rebuild(latents[:, :, :position], position)
    emitted = 0 if position == 0 else 4 * position - 3
    assert torch.equal(decoder.decode(latents[:, :, position:]), decode_at_once(vae, latents)[:, :, emitted:])


def small_tiles(vae):
    factor = vae.spatial_compression_ratio
    vae.tile_sample_min_height = vae.tile_sample_min_width = TILE * factor
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = STRIDE * factor
    return vae


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_too_few_latents_do_not_rebuild_and_an_error_leaves_no_half_state(vae, tiled):
    decoder, latents = StreamingDecoder(small_tiles(vae), tiled=tiled), noise(5)
    whole = decoder.decode(latents)
    for position, needed in ((60, 33), (5, 5)):
        says = f"4 latents do not rebuild the decoder at latent {position}; it takes {needed}"
        with pytest.raises(ValueError, match=says):
            decoder.rebuild(latents[:, :, :4], position)
    decoder.rebuild(latents[:, :, :3], 3)
    assert decoder.position == 3
    assert torch.equal(decoder.decode(latents[:, :, 3:]), whole[:, :, 9:])
    with pytest.raises(RuntimeError):
        decoder.decode(torch.zeros(1, 5, 1, 4, 4))
    assert decoder.position == 0
    assert torch.equal(decoder.decode(latents[:, :, :2]), whole[:, :, :5])


@torch.no_grad()
def tiled_by_diffusers(vae, latents):
    return vae.tiled_decode(denormalise(latents, vae.config), return_dict=False)[0]


@pytest.mark.parametrize("vae", ["wan21", "wan22"], indirect=True)
def test_any_cut_gives_the_bits_of_diffusers_tiles(vae):
    seen, latents, decoder = [], noise(5, 3), StreamingDecoder(small_tiles(vae), tiled=True)
    vae.decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[-2:]))
    video = torch.cat([decoder.decode(part) for part in latents.split([1, 2, 2], dim=2)], dim=2)
    assert decoder.position == 5
    assert max(max(shape) for shape in seen) == TILE, "no more than a tile at a time"
    assert torch.equal(video, tiled_by_diffusers(vae, latents))
    assert not torch.equal(video, decode_at_once(vae, latents)), "the cuts between tiles are not nothing"
    small = latents[:, :, :2, :STRIDE, :STRIDE]
    assert torch.equal(StreamingDecoder(vae, tiled=True).decode(small), decode_at_once(vae, small))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tiled_from", [4, 0, 5])
def test_a_run_is_tiled_from_a_position_on_and_what_is_lost_comes_back_so(vae, tiled_from):
    small_tiles(vae)
    latents = noise(5, 3)

    def preceding(position):
        return lambda count: latents[:, :, position - count : position]

    stream = RunStream(vae)
    video = [stream.decode(latents[:, :, :tiled_from], 0, keep_frames=5)] if tiled_from else []
    stream.tiled_from = tiled_from
    if tiled_from < 5:
        video.append(stream.decode(latents[:, :, tiled_from:], tiled_from, preceding(tiled_from), keep_frames=5))
    video = torch.cat(video, dim=2)
    first = 4 * tiled_from - 3 if tiled_from else 0
    assert torch.equal(video[:, :, :first], decode_at_once(vae, latents)[:, :, :first])
    assert torch.equal(video[:, :, first:], tiled_by_diffusers(vae, latents)[:, :, first:])
    kept, again = (one.last_frames(5, 5, preceding(5)) for one in (stream, RunStream(vae, tiled_from)))
    assert torch.equal(kept, video[:, :, -5:])
    assert torch.equal(again, kept), "decoded again, part of it in tiles"


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (9, 3), (2, None), (8, None)])
def test_a_clip_has_a_latent_for_its_first_frame_and_one_for_each_four(vae, frames, latents):
    video = torch.zeros(1, 3, frames, 32, 48)
    if latents is None:
        with pytest.raises(ValueError, match=f"{frames} frames cannot be encoded; it takes 4k\\+1"):
            encode_video(vae, video)
    else:
        encoded = encode_video(vae.to(torch.bfloat16), video)
        assert encoded.shape == (1, 4, latents, 4, 6)
        assert encoded.dtype == torch.float32


def test_the_embedded_model_finds_its_own_frames_again():
    """Trained weights: what they decoded they encode to almost the same latents, and its decoder looks back 33."""
    pipe = EditWanPipeline.from_pretrained("builtin:tiny_wan")
    assert lookback_latents(pipe.vae.config) == 33
    video = torch.full((1, 3, 5, 64, 64), -0.9)
    video[:, 0, :, 20:40, 20:40] = 0.9  # a red square on black
    again = StreamingDecoder(pipe.vae).decode(encode_video(pipe.vae, video))
    assert (again - video).abs().mean() < 0.1
