"""Segments decoded one by one are one video decoded at once, bit for bit, also when a new process goes on."""

import pytest
import torch

from edit_ray.config.model import layout_of
from edit_ray.engine.decode import to_uint8
from edit_ray.engine.model_info import lookback_latents
from edit_ray.engine.options import ContinuityOptions, ModelOptions, SamplingOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.engine.vae_stream import RunStream
from edit_ray.testing import save_random_wan
from tests.decoding import decode_at_once

SEGMENTS, RESUMED = 5, 4
SAMPLING = SamplingOptions(height=32, width=32, num_frames=49, num_inference_steps=2, guidance_scale=1.0)
CARRIED = {"history": {"mode": "history"}}
CARRIED |= {f"overlap-{of}": {"mode": "overlap", "overlap_source": of} for of in ("hybrid", "latent", "reencode")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("wan"), expand_timesteps=True)


def new_engine(folder):
    return SegmentEngine.load(ModelOptions(path=str(folder), device="cpu"), cpu_threads=1)


def make(engine, continuity, parts, until, *, decode=True, sampling=SAMPLING, seed=int):
    """Segments from len(parts) on, appended to `parts`; their frames, as the GPU actor makes them."""
    layout, frames = layout_of(sampling, continuity), []

    def preceding(count):
        return torch.cat(parts[:index], dim=2)[:, :, -count:]

    for index in range(len(parts), until):
        position = layout.first_latent(index)
        context = engine.context(continuity, "run", position=position, preceding=preceding) if index else {}
        latents = engine.denoise(sampling, prompt="a red circle", seed=seed(index), **context)
        parts.append(latents[:, :, position - layout.first_latent(index + 1) :])
        if decode:
            run_id = "run" if continuity.carried_latents else None
            keep = continuity.carried_frames
            frames.append(engine.decode(run_id, parts[-1], position=position, preceding=preceding, keep_frames=keep))
    return frames


SLOW = ("overlap-latent", "overlap-reencode")


@pytest.fixture(
    scope="module", params=[pytest.param(mode, marks=[pytest.mark.slow] * (mode in SLOW)) for mode in CARRIED]
)
def run(request, folder):
    """An engine that has made a run: its options, its latents by segment, its frames by segment."""
    engine, continuity, parts = new_engine(folder), ContinuityOptions(**CARRIED[request.param]), []
    frames = make(engine, continuity, parts, SEGMENTS)
    return engine, continuity, parts, frames


@pytest.mark.one_in(2)
def test_segments_are_one_video(run):
    engine, continuity, parts, frames = run
    layout = layout_of(SAMPLING, continuity)
    assert [len(part) for part in frames] == [layout.frames_of(index) for index in range(SEGMENTS)]
    whole = decode_at_once(engine.pipe.vae, torch.cat(parts, dim=2))
    assert torch.equal(torch.cat(frames), to_uint8(whole))
    stream, at = RunStream(engine.pipe.vae), [layout.first_latent(index) for index in range(SEGMENTS)]
    pieces = [stream.decode(part, position) for part, position in zip(parts, at, strict=True)]
    assert torch.equal(torch.cat(pieces, dim=2), whole), "and before rounding"


def test_another_process_goes_on_with_the_same_bits(run, folder):
    _, continuity, parts, frames = run
    position = layout_of(SAMPLING, continuity).first_latent(RESUMED)
    engine = new_engine(folder)
    assert position > lookback_latents(engine.pipe.vae.config) + 3, "it is rebuilt from a part of the stream"
    again = parts[:RESUMED]
    rest = make(engine, continuity, again, SEGMENTS)
    assert all(torch.equal(one, other) for one, other in zip(again, parts, strict=True))
    assert torch.equal(torch.cat(rest), torch.cat(frames[RESUMED:]))


def test_latents_do_not_depend_on_what_was_decoded_before(run, folder):
    """Whoever denoises before the frames are there decodes what it needs itself."""
    _, continuity, parts, _ = run
    alone = []
    make(new_engine(folder), continuity, alone, 3, decode=False)
    assert all(torch.equal(one, other) for one, other in zip(alone, parts, strict=False))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["none", "warm_start"])
def test_segments_that_stand_alone_are_decoded_alone(mode, folder):
    engine, continuity, parts = new_engine(folder), ContinuityOptions(mode=mode), []
    frames = make(engine, continuity, parts, 2)
    assert sum(map(len, frames)) == 2 * SAMPLING.num_frames == layout_of(SAMPLING, continuity).total_frames(2)
    for part, decoded in zip(parts, frames, strict=True):
        assert torch.equal(decoded, to_uint8(decode_at_once(engine.pipe.vae, part)))
