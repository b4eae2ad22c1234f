"""What is computed before the loop changes no bit, whatever a callback does meanwhile."""

import copy

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from peft import LoraConfig

from edit_ray.engine.precompute import can_precompute
from tests.parity.test_pipeline_parity import SQUARES, assert_equal_latents, generate

SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SMALL = {"height": 32, "width": 32}


def test_prompts_are_projected_once_and_times_embedded_once_a_schedule(pair_of, monkeypatch):
    ours, tokens = pair_of("random").ours, []
    # The hook that counts is no change.
    monkeypatch.setattr("edit_ray.engine.precompute.is_unmodified", lambda *_, **__: True)
    first_layer = ours.transformer.condition_embedder.text_embedder.linear_1
    handle = first_layer.register_forward_pre_hook(lambda _module, args: tokens.append(args[0].shape[1]))
    for _ in range(2):
        generate(ours, **SMALL)
    handle.remove()
    assert tokens == [1] * 3 + [32] * 2 + [32] * 2


def weights_in_place(pipe, step, _timestep, tensors):
    factor = {0: 2.0, 1: 0.5}.get(step)
    if factor is not None:
        with torch.no_grad():
            pipe.transformer.condition_embedder.text_embedder.linear_2.weight.mul_(factor)
            pipe.transformer.condition_embedder.time_proj.weight.mul_(factor)
    return {}


def another_scheduler(pipe, step, _timestep, tensors):
    if step == 1:
        pipe.scheduler = UniPCMultistepScheduler(**SCHEDULER | {"flow_shift": 7.0})
        pipe.scheduler.set_timesteps(3)
        pipe.scheduler.set_begin_index(2)
    return {}


def timesteps_in_place(pipe, step, _timestep, tensors):
    if step == 0:
        pipe.scheduler.timesteps[1:] -= 7
    return {}


def embeddings_in_place(pipe, step, _timestep, tensors):
    tensors["prompt_embeds"].mul_(-1)
    return {}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "change", [weights_in_place, another_scheduler, timesteps_in_place, embeddings_in_place], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["random", "random-expand"])
def test_what_a_callback_changes_acts(pair_of, name, change):
    pair = pair_of(name)
    seen = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    changed = assert_equal_latents(pair, **SMALL, callback_on_step_end=change, **seen)
    for pipe in pair:
        pipe.scheduler = UniPCMultistepScheduler(**SCHEDULER)
    assert not torch.equal(changed, assert_equal_latents(pair, **SMALL))


def test_the_next_call_may_have_other_weights_prompts_and_sizes(pair_of):
    pair, other = pair_of("random"), {"prompt": SQUARES, "height": 32, "width": 48}
    assert_equal_latents(pair, **SMALL)
    bias = pair.ours.transformer.condition_embedder.time_proj.bias.detach()  # the weights are those of both
    bias.mul_(2)
    changed = assert_equal_latents(pair, **other)
    bias.mul_(0.5)
    assert not torch.equal(changed, assert_equal_latents(pair, **other))


def test_under_inference_mode(pair_of):
    ours = pair_of("random").ours
    wanted = generate(ours)
    with torch.inference_mode():
        assert torch.equal(generate(ours), wanted)
    assert torch.equal(generate(ours), wanted)


def test_adapters_and_hooks_leave_the_embedder_alone(pair_of):
    transformer = copy.deepcopy(pair_of("random").ours.transformer)
    assert can_precompute(transformer)
    handle = transformer.condition_embedder.time_proj.register_forward_hook(lambda *_: None)
    assert not can_precompute(transformer)
    handle.remove()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["time_proj", "to_q"]))
    assert not can_precompute(transformer)
    transformer.delete_adapters("default")


def test_nothing_is_left_on_the_transformer(pair_of):
    ours = pair_of("random").ours

    def with_own_forward():
        return {name for name, module in ours.transformer.named_modules() if "forward" in module.__dict__}

    before = with_own_forward()  # hooks of diffusers that are gone leave theirs, in whichever test they were

    def fail(pipe, step, timestep, tensors):
        assert "forward" in pipe.transformer.rope.__dict__
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(ours, callback_on_step_end=fail)
    assert with_own_forward() == before
