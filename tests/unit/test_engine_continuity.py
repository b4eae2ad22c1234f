"""What a context does to the latents that are denoised behind it."""

import pytest
import torch

from edit_ray.engine.continuity import ContextLatents, check_context, hold, match_statistics


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_clean_context_replaces_the_first_slots_only():
    latents, context = torch.zeros(2, 4, 5, 2, 2), torch.ones(2, 4, 3, 2, 2)
    held = hold(latents, ContextLatents(context), 0.7)
    assert held.sum(dim=(0, 1, 3, 4)).tolist() == [32, 32, 32, 0, 0]
    assert latents.sum() == 0, "the argument stays as it is"
    assert hold(latents, None, 0.7) is latents


def test_a_noisy_context_is_pure_noise_at_one_and_clean_at_zero():
    held = ContextLatents(noise(1, 4, 3, 2, 2), noise(1, 4, 3, 2, 2, seed=1))
    assert torch.equal(held.at(1.0), held.noise)
    assert torch.equal(held.at(0.0), held.context)
    assert torch.allclose(held.at(0.25), 0.75 * held.context + 0.25 * held.noise)


@pytest.mark.parametrize(
    "shape", [(4, 3, 2, 2), (1, 4, 0, 2, 2), (1, 4, 3, 2, 3), (1, 3, 3, 2, 2), (2, 4, 3, 2, 2), (1, 4, 5, 2, 2)]
)
@pytest.mark.parametrize("name", ["history", "overlap"])
def test_a_context_of_another_shape_is_refused(name, shape):
    with pytest.raises(ValueError, match=f"`{name}`.* valid"):
        check_context(name, torch.zeros(shape), torch.zeros(1, 4, 5, 2, 2))


def test_a_context_takes_the_type_of_the_latents():
    context = check_context("history", torch.zeros(1, 4, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 4, 5, 2, 2))
    assert context.dtype == torch.float32


def test_statistics_are_matched_as_far_as_asked():
    latents, reference = 2 * noise(1, 4, 6, 8, 8) + 3, noise(1, 4, 9, 8, 8, seed=1)
    dims = (2, 3, 4)
    assert torch.equal(match_statistics(latents, reference, 0.0), latents)
    whole = match_statistics(latents, reference, 1.0)
    assert torch.allclose(whole.mean(dims), reference.mean(dims), atol=1e-5)
    assert torch.allclose(whole.std(dims), reference.std(dims), atol=1e-5)
    quarter = match_statistics(latents, reference, 0.25)
    assert torch.allclose(quarter, latents + (whole - latents) / 4, atol=1e-6)
    flat = torch.full((1, 4, 2, 8, 8), 5.0)
    assert match_statistics(flat, reference, 0.25).isfinite().all()
