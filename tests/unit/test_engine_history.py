"""Segments that continue others: what `history` fixes, and what it leaves to be denoised."""

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.testing import save_random_wan

SIZE = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path_factory.mktemp("wan"), expand_timesteps=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, *, seed: int = 0, **kwargs) -> torch.Tensor:
    arguments = {"prompt": "a red circle", "output_type": "latent", **SIZE} | kwargs
    return pipe(generator=torch.Generator().manual_seed(seed), **arguments).frames


@pytest.fixture(scope="module")
def history(pipe):
    return generate(pipe, seed=5)[:, :, -2:]


def test_history_comes_back_bit_for_bit_and_steers_the_rest(pipe, history):
    free, held, other = generate(pipe), generate(pipe, history=history), generate(pipe, history=history + 1)
    assert held.shape == free.shape == (1, 4, 5, 4, 4)
    assert torch.equal(held[:, :, :2], history)
    assert not torch.equal(held[:, :, 2:], free[:, :, 2:])
    assert not torch.equal(held[:, :, 2:], other[:, :, 2:])


def test_the_noise_of_the_new_slots_is_that_of_the_whole_window(pipe, history):
    """One draw for all T slots, so that a seed means the same with and without history."""
    noise = torch.randn(1, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generate(pipe, history=history), generate(pipe, history=history, latents=noise, seed=9))
    noise[:, :, :2] = 0
    assert torch.equal(generate(pipe, history=history), generate(pipe, history=history, latents=noise, seed=9))


def test_clean_slots_see_timestep_zero_and_no_noise(pipe, history):
    seen = []

    def watch(module, args, kwargs):
        seen.append(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        generate(pipe, history=history, guidance_scale=4.0)
    finally:
        handle.remove()
    assert len(seen) == 6
    for index, forward in enumerate(seen):
        assert torch.equal(forward["hidden_states"][:, :, :2], history)
        tokens = forward["timestep"].reshape(5, 2, 2)
        assert (tokens[:2] == 0).all()
        assert (tokens[2:] == pipe.scheduler.timesteps[index // 2]).all()


def test_a_callback_sees_history_and_cannot_change_it(pipe, history):
    seen = []

    def spoil(pipe, step, timestep, tensors):
        seen.append(tensors["latents"][:, :, :2].clone())
        return {"latents": tensors["latents"] + 1}

    held = generate(pipe, history=history, callback_on_step_end=spoil)
    assert all(torch.equal(tail, history) for tail in seen)
    assert torch.equal(held[:, :, :2], history)


def test_frames_cover_the_whole_window(pipe, history):
    assert generate(pipe, history=history, output_type="np").shape == (1, 17, 32, 32, 3)


def test_bfloat16_keeps_history_in_full_precision(tmp_path, history):
    folder = save_random_wan(tmp_path, expand_timesteps=True)
    pipe = EditWanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert torch.equal(generate(pipe, history=history)[:, :, :2], history.to(generate(pipe).dtype))


def test_models_without_per_token_timesteps_refuse_history(tmp_path, history):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path))
    with pytest.raises(ValueError, match="expand_timesteps"):
        generate(pipe, history=history)


def test_history_that_fills_the_window_is_refused(pipe, history):
    with pytest.raises(ValueError, match="nothing to denoise"):
        generate(pipe, history=history, num_frames=5)
    with pytest.raises(ValueError, match="shape"):
        generate(pipe, history=history, height=48)
