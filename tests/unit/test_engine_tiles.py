"""Decoding in tiles: the bits of diffusers' own tiles, however the stream is cut and whatever was lost on the way."""

import pytest
import torch

from edit_ray.engine.decode import StreamingDecoder, denormalise
from edit_ray.engine.vae_stream import RunStream
from edit_ray.testing import random_vae
from tests.decoding import decode_at_once
from tests.unit.test_engine_decode import VAES

TILE, STRIDE = 3, 2  # latents
LATENTS = 5

pytestmark = pytest.mark.usefixtures("one_thread")


def small_tiles(vae):
    factor = vae.spatial_compression_ratio
    vae.tile_sample_min_height = vae.tile_sample_min_width = TILE * factor
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = STRIDE * factor
    return vae


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return small_tiles(random_vae())


def noise(frames=LATENTS):
    return torch.randn(1, 4, frames, 3, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tiled_by_diffusers(vae, latents):
    return vae.tiled_decode(denormalise(latents, vae.config), return_dict=False)[0]


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_any_cut_gives_the_bits_of_diffusers_tiles(name):
    torch.manual_seed(0)
    vae, seen = small_tiles(random_vae(**VAES[name])), []
    vae.decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[-2:]))
    latents, decoder = noise(), StreamingDecoder(vae, tiled=True)
    video = torch.cat([decoder.decode(part) for part in latents.split([1, 2, 2], dim=2)], dim=2)
    assert decoder.position == LATENTS
    assert max(max(shape) for shape in seen) == TILE, "no more than a tile at a time"
    assert torch.equal(video, tiled_by_diffusers(vae, latents))
    assert not torch.equal(video, decode_at_once(vae, latents)), "the cuts between tiles are not nothing"


def test_frames_no_larger_than_a_tile_are_those_of_whole_decoding(vae):
    latents = noise()[:, :, :2, :STRIDE, :STRIDE]
    assert torch.equal(StreamingDecoder(vae, tiled=True).decode(latents), decode_at_once(vae, latents))


def test_it_is_rebuilt_and_reset_and_an_error_leaves_no_half_state(vae):
    latents, decoder = noise(), StreamingDecoder(vae, tiled=True)
    whole = decoder.decode(latents)
    decoder.rebuild(latents[:, :, :3], 3)
    assert decoder.position == 3
    assert torch.equal(decoder.decode(latents[:, :, 3:]), whole[:, :, 9:])
    with pytest.raises(ValueError, match="1 latents do not rebuild the decoder at latent 4"):
        decoder.rebuild(latents[:, :, :1], 4)
    with pytest.raises(RuntimeError):
        decoder.decode(torch.zeros(1, 5, 1, 3, 4))
    assert decoder.position == 0
    assert torch.equal(decoder.decode(latents[:, :, :1]), whole[:, :, :1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tiled_from", [0, 4, LATENTS])
def test_a_run_is_tiled_from_a_position_on_and_what_is_lost_comes_back_so(vae, tiled_from):
    latents = noise()

    def preceding(position):
        return lambda count: latents[:, :, position - count : position]

    stream = RunStream(vae)
    video = [stream.decode(latents[:, :, :tiled_from], 0, keep_frames=5)] if tiled_from else []
    stream.tiled_from = tiled_from
    if tiled_from < LATENTS:
        video.append(stream.decode(latents[:, :, tiled_from:], tiled_from, preceding(tiled_from), keep_frames=5))
    video = torch.cat(video, dim=2)
    first = 4 * tiled_from - 3 if tiled_from else 0
    assert torch.equal(video[:, :, :first], decode_at_once(vae, latents)[:, :, :first])
    assert torch.equal(video[:, :, first:], tiled_by_diffusers(vae, latents)[:, :, first:])
    kept, again = (one.last_frames(5, LATENTS, preceding(LATENTS)) for one in (stream, RunStream(vae, tiled_from)))
    assert torch.equal(kept, video[:, :, -5:])
    assert torch.equal(again, kept), "decoded again, part of it in tiles"
