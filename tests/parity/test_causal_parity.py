"""Chunks with K/V are what one pass over all chunks is, and what the published algorithm makes."""

import copy

import pytest
import torch

from edit_ray.engine.causal_options import CausalOptions
from edit_ray.engine.causal_pipeline import EditCausalWanPipeline
from edit_ray.runs.run_plan import chunk_seed
from edit_ray.testing import save_random_wan
from tests.parity.causal_reference import attention_of, chunked, one_pass, published_video

NUM_CHUNKS = 7
WINDOWS = [(1, 0, 1), (4, 1, 1), (6, 3, 3), (9, 0, 3), (12, 3, 3), (12, 6, 3), (21, 0, 3)]  # window, sink, chunk_size


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = save_random_wan(tmp_path_factory.mktemp("causal"), num_layers=3, causal={"window": 12, "sink": 3})
    pipe = EditCausalWanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def exact(request, pipe, monkeypatch):
    """The transformer in a type, and the tolerance; in float64 without diffusers' casts to float32."""
    model = copy.deepcopy(pipe.transformer).to(request.param)
    if request.param == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    return model, 1e-9 if request.param == torch.float64 else 1e-5


def inputs(model, chunk_size: int, num_chunks: int = NUM_CHUNKS, batch: int = 2):
    """Latents, a timestep for each chunk, and a text."""
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, num_chunks * chunk_size, 4, 6, generator=draw, dtype=torch.float64)
    text = torch.randn(batch, 5, 32, generator=draw, dtype=torch.float64)
    timesteps = torch.linspace(900, 100, num_chunks)
    return latents.to(model.dtype), timesteps, text.to(model.dtype)


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize(("window", "sink", "chunk_size"), WINDOWS)
@torch.no_grad()
def test_chunks_with_kv_are_one_pass_over_all_of_them(exact, rope, window, sink, chunk_size):
    model, tolerance = exact
    options = CausalOptions(window=window, sink=sink, chunk_size=chunk_size, rope=rope)
    given = inputs(model, chunk_size)
    expected = one_pass(model, *given, options)
    made = chunked(model, *given, attention_of(model, given[0], options))
    assert (made - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_the_reference_sees_a_window_that_is_wrong(pipe):
    options = CausalOptions(window=9, sink=3)
    given = inputs(pipe.transformer, 3)
    made = chunked(pipe.transformer, *given, attention_of(pipe.transformer, given[0], options))
    for other in ({"window": 12}, {"sink": 0}, {"rope": "absolute"}):
        expected = one_pass(pipe.transformer, *given, options.model_copy(update=other))
        assert (made - expected).abs().max() > 1e-3


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@torch.no_grad()
def test_a_single_chunk_is_the_bidirectional_forward(pipe, rope):
    latents, timesteps, text = inputs(pipe.transformer, 6, num_chunks=1)
    options = CausalOptions(chunk_size=6, window=24, rope=rope)
    expected = pipe.transformer(latents, timesteps.expand(2), text, return_dict=False)[0]
    made = chunked(pipe.transformer, latents, timesteps, text, attention_of(pipe.transformer, latents, options))
    assert torch.equal(made, expected)


@pytest.mark.parametrize(("window", "sink"), [(21, 0), (12, 3)])
@torch.no_grad()
def test_the_published_algorithm_makes_the_same_video(pipe, window, sink):
    num_chunks, causal = 10, {"rope": "absolute", "window": window, "sink": sink}
    stream = pipe.stream("a red circle", height=32, width=48, decode=False, **causal)
    made = torch.cat([next(stream).latents for _ in range(num_chunks)], dim=2)

    def noise(chunk: int, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(chunk_seed(stream._seeds[0], chunk, step))
        return torch.randn(1, 4, 3, 4, 6, generator=draw)

    model, text = copy.deepcopy(pipe.transformer), stream._texts[0]
    expected = published_video(model, text, noise, num_chunks, window, sink)
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
