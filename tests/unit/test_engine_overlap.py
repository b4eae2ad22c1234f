"""Segments that overlap their predecessor: what is held in their first slots at every step."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from edit_ray import EditWanPipeline
from edit_ray.testing import save_random_wan

SIZE = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 4}
KINDS = {
    "unipc": {},
    "flow-match-euler": {},
    "per-token timesteps": {"expand_timesteps": True},
    "two experts": {"two_experts": True},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=KINDS)
def pipe(request, tmp_path_factory):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path_factory.mktemp("wan"), **KINDS[request.param]))
    pipe.set_progress_bar_config(disable=True)
    if request.param == "flow-match-euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


def noise(slots=5, seed=0):
    return torch.randn(1, 4, slots, 4, 4, generator=torch.Generator().manual_seed(seed))


def generate(pipe, **kwargs) -> torch.Tensor:
    arguments = {"prompt": "a red circle", "output_type": "latent", "latents": noise(), "guidance_scale": 4.0}
    return pipe(**(arguments | SIZE | kwargs)).frames


def test_the_context_is_as_noisy_as_the_step_and_clean_at_the_end(pipe):
    context, seen, levels = noise(2, seed=1), [], []

    def watch(module, args, kwargs):
        seen.append(kwargs)

    handles = [
        expert.register_forward_pre_hook(watch, with_kwargs=True)
        for expert in (pipe.transformer, pipe.transformer_2)
        if expert is not None
    ]
    after = []
    try:
        whole = generate(
            pipe,
            overlap=context,
            callback_on_step_end=lambda pipe, i, t, tensors: after.append(tensors["latents"][:, :, :2].clone()) or {},
        )
    finally:
        for handle in handles:
            handle.remove()
    levels = [float(sigma) for sigma in pipe.scheduler.sigmas]
    expected = [(1 - sigma) * context + sigma * noise()[:, :, :2] for sigma in levels]
    assert len(seen) == 8
    assert len(levels) == 5
    for index, forward in enumerate(seen):
        assert torch.equal(forward["hidden_states"][:, :, :2], expected[index // 2])
        assert (forward["timestep"] == pipe.scheduler.timesteps[index // 2]).all(), "no slot is called clean"
    assert all(torch.equal(held, wanted) for held, wanted in zip(after, expected[1:], strict=True))
    assert torch.equal(whole[:, :, :2], context)


@pytest.mark.one_in(2)
def test_the_rest_follows_the_context(pipe):
    free, held, other = (generate(pipe, overlap=context) for context in (None, noise(2, seed=1), noise(2, seed=2)))
    assert not torch.equal(held[:, :, 2:], free[:, :, 2:])
    assert not torch.equal(held[:, :, 2:], other[:, :, 2:])


def test_it_equals_a_velocity_that_leads_to_the_context(pipe):
    """The same thing said otherwise: in the first slots the model would have said noise minus context."""
    context = noise(2, seed=1)
    velocity = noise()[:, :, :2] - context

    def override(module, args, output):
        return (torch.cat([velocity, output[0][:, :, 2:]], dim=2),)

    experts = [expert for expert in (pipe.transformer, pipe.transformer_2) if expert is not None]
    handles = [expert.register_forward_hook(override) for expert in experts]
    try:
        started = noise()
        pipe.scheduler.set_timesteps(SIZE["num_inference_steps"])
        first = float(pipe.scheduler.sigmas[0])
        started[:, :, :2] = (1 - first) * context + first * started[:, :, :2]
        expected = generate(pipe, latents=started)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.allclose(generate(pipe, overlap=context), expected, atol=1e-5)


def test_a_callback_cannot_change_the_context(pipe):
    context = noise(2, seed=1)
    spoiled = generate(
        pipe, overlap=context, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": tensors["latents"] + 1}
    )
    assert torch.equal(spoiled[:, :, :2], context)


def test_what_makes_no_sense_is_refused(pipe):
    with pytest.raises(ValueError, match="both given"):
        generate(pipe, overlap=noise(2), history=noise(2))
    with pytest.raises(ValueError, match="leave nothing to denoise"):
        generate(pipe, overlap=noise(5))
