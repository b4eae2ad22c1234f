"""Segments that continue others: what `history` and `overlap` hold their first slots to, and latents on disk."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edit_ray.engine.continuity import (
    ContextLatents,
    check_context,
    hold,
    latent_tail,
    load_latents,
    match_statistics,
    save_latents,
)
from edit_ray.errors import EditRayError
from edit_ray.testing import save_random_wan
from tests.calls import latents, load

SIZE = {"num_frames": 17, "num_inference_steps": 3}
KINDS = {
    "unipc": {},
    "flow-match-euler": {},
    "per-token timesteps": {"expand_timesteps": True},
    "two experts": {"two_experts": True},
}
HISTORY, OVERLAP = ("per-token timesteps", "history"), "overlap"

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(slots=5, seed=0, size=4):
    return torch.randn(1, 4, slots, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape", [(4, 3, 2, 2), (1, 4, 0, 2, 2), (1, 4, 3, 2, 3), (1, 3, 3, 2, 2), (2, 4, 3, 2, 2), (1, 4, 5, 2, 2)]
)
def test_a_context_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"`name`.*; (it|there) must be"):
        check_context("name", torch.zeros(shape), torch.zeros(1, 4, 5, 2, 2))


def test_a_context_takes_the_type_of_the_latents_and_leaves_them_as_they_are():
    latents = torch.zeros(1, 4, 5, 2, 2)
    context = check_context("history", torch.ones(1, 4, 3, 2, 2, dtype=torch.float64), latents)
    assert context.dtype == torch.float32
    assert hold(latents, ContextLatents(context), 0.7).sum(dim=(0, 1, 3, 4)).tolist() == [16, 16, 16, 0, 0]
    assert latents.sum() == 0
    assert hold(latents, None, 0.7) is latents


def test_statistics_are_matched_as_far_as_asked():
    latents, reference = 2 * noise(6, size=8) + 3, noise(9, seed=1, size=8)
    dims = (2, 3, 4)
    assert torch.equal(match_statistics(latents, reference, 0.0), latents)
    whole = match_statistics(latents, reference, 1.0)
    assert torch.allclose(whole.mean(dims), reference.mean(dims), atol=1e-5)
    assert torch.allclose(whole.std(dims), reference.std(dims), atol=1e-5)
    quarter = match_statistics(latents, reference, 0.25)
    assert torch.allclose(quarter, latents + (whole - latents) / 4, atol=1e-6)
    flat = torch.full((1, 4, 2, 8, 8), 5.0)
    assert match_statistics(flat, reference, 0.25).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), count=st.integers(1, 12))
def test_the_tail_is_the_end_of_the_stream_bit_for_bit(tmp_path_factory, lengths, count):
    folder = tmp_path_factory.mktemp("latents")
    parts = [torch.randn(1, 2, length, 2, 2) for length in lengths]
    paths = [folder / f"{index}.safetensors" for index in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        save_latents(path, part)
    assert torch.equal(latent_tail(paths, count), torch.cat(parts, dim=2)[:, :, -count:])


def test_what_is_no_latents_file_is_named(tmp_path):
    missing, damaged, other = (tmp_path / name for name in "abc")
    damaged.write_bytes(b"\0" * 64)
    save_file({"latents": torch.zeros(2, 3)}, other)
    cannot, shape = "cannot read the latents", r"not float32 \[1, C, t, h, w\]"
    for path, says in ((missing, cannot), (damaged, cannot), (other, shape)):
        with pytest.raises(EditRayError, match=says):
            load_latents(path)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Pipelines by kind, loaded when somebody asks for them."""

    class Pipes(dict):
        def __missing__(self, kind):
            folder = save_random_wan(tmp_path_factory.mktemp("wan"), **KINDS[kind])
            pipe = self[kind] = load(folder)
            if kind == "flow-match-euler":
                pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            return pipe

    return Pipes()


@pytest.fixture(params=KINDS)
def pipe(request, pipes):
    return pipes[request.param]


@pytest.fixture(params=[*((kind, OVERLAP) for kind in KINDS), HISTORY], ids=str)
def continued(request, pipes):
    """A pipeline, and the name of the argument that a segment continues."""
    kind, name = request.param
    return pipes[kind], name


def generate(pipe, **kwargs) -> torch.Tensor:
    return latents(pipe, **(SIZE | {"latents": noise(), "guidance_scale": 4.0} | kwargs))


def forwards_of(pipe, **kwargs):
    """The latents of a call, and the arguments of its forwards."""
    seen, experts = [], [expert for expert in (pipe.transformer, pipe.transformer_2) if expert is not None]
    note = {"hook": lambda _module, _args, given: seen.append(given), "with_kwargs": True}
    handles = [expert.register_forward_pre_hook(**note) for expert in experts]
    made = generate(pipe, **kwargs)
    for handle in handles:
        handle.remove()
    return made, seen


def test_a_noisy_context_is_as_noisy_as_the_step_and_clean_at_the_end(pipe):
    context, after = noise(2, seed=1), []

    def keep(pipe, step, timestep, tensors):
        after.append(tensors["latents"][:, :, :2].clone())
        return {}

    whole, seen = forwards_of(pipe, overlap=context, callback_on_step_end=keep)
    levels = [float(sigma) for sigma in pipe.scheduler.sigmas]
    expected = [(1 - sigma) * context + sigma * noise()[:, :, :2] for sigma in levels]
    assert len(seen) == 6
    assert len(levels) == 4
    for index, forward in enumerate(seen):
        assert torch.equal(forward["hidden_states"][:, :, :2], expected[index // 2])
        assert (forward["timestep"] == pipe.scheduler.timesteps[index // 2]).all(), "no slot is called clean"
    assert all(torch.equal(held, wanted) for held, wanted in zip(after, expected[1:], strict=True))
    assert torch.equal(whole[:, :, :2], context)


def test_clean_slots_see_timestep_zero_and_no_noise(pipes):
    pipe, history = pipes[HISTORY[0]], noise(2, seed=1)
    _, seen = forwards_of(pipe, history=history)
    assert len(seen) == 6
    for index, forward in enumerate(seen):
        assert torch.equal(forward["hidden_states"][:, :, :2], history)
        tokens = forward["timestep"].reshape(5, 2, 2)
        assert (tokens[:2] == 0).all()
        assert (tokens[2:] == pipe.scheduler.timesteps[index // 2]).all()


@pytest.mark.one_in(2)
def test_the_context_comes_back_bit_for_bit_and_steers_the_rest(continued):
    pipe, name = continued
    free = generate(pipe)
    held, other = (generate(pipe, **{name: noise(2, seed=seed)}) for seed in (1, 2))
    assert held.shape == free.shape == (1, 4, 5, 4, 4)
    assert torch.equal(held[:, :, :2], noise(2, seed=1))
    assert not torch.equal(held[:, :, 2:], free[:, :, 2:])
    assert not torch.equal(held[:, :, 2:], other[:, :, 2:])


def test_a_callback_sees_the_context_and_cannot_change_it(continued):
    pipe, name = continued
    context, seen = noise(2, seed=1), []

    def spoil(pipe, step, timestep, tensors):
        seen.append(tensors["latents"][:, :, :2].clone())
        return {"latents": tensors["latents"] + 1}

    spoiled = generate(pipe, **{name: context}, callback_on_step_end=spoil)
    assert torch.equal(seen[-1], context)
    assert name == "overlap" or all(torch.equal(held, context) for held in seen)
    assert torch.equal(spoiled[:, :, :2], context)


def test_the_noise_of_the_new_slots_is_that_of_the_whole_window(pipes):
    """One draw for all T slots, so that a seed means the same with and without history."""
    pipe, changed = pipes[HISTORY[0]], noise(seed=0)
    changed[:, :, :2] = 0
    drawn, *given_ = (
        generate(pipe, history=noise(2, seed=1), latents=latents, generator=torch.Generator().manual_seed(seed))
        for latents, seed in ((None, 0), (noise(), 9), (changed, 9))
    )
    assert all(torch.equal(drawn, latents) for latents in given_)


def test_what_makes_no_sense_is_refused(continued):
    pipe, name = continued
    with pytest.raises(ValueError, match="both given"):
        generate(pipe, overlap=noise(2), history=noise(2))
    with pytest.raises(ValueError, match="leave nothing to denoise"):
        generate(pipe, **{name: noise(5)})
    with pytest.raises(ValueError, match="shape"):
        generate(pipe, **{name: noise(2)}, height=48, latents=None)


def test_models_without_per_token_timesteps_refuse_history(pipes):
    with pytest.raises(ValueError, match="expand_timesteps"):
        generate(pipes["unipc"], history=noise(2))


def test_bfloat16_keeps_history_in_full_precision(tmp_path):
    folder = save_random_wan(tmp_path, expand_timesteps=True)
    pipe, history = load(folder, torch_dtype=torch.bfloat16), noise(2, seed=1)
    assert torch.equal(generate(pipe, history=history)[:, :, :2], history.to(generate(pipe).dtype))
