"""`EditWanPipeline` gives the bits of `diffusers.WanPipeline`, for every argument of the call."""

import io
import re
from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    SeaCacheConfig,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from edit_ray import EditWanPipeline

CIRCLE = "a red circle bouncing on a black background"
SQUARES = "a blue square and a green circle bouncing on a white background"
NOISE_SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "flow_match_euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def generate(pipe: WanPipeline, *, seed: int = 7, **kwargs) -> object:
    """One small call; the batch as diffusers returns it."""
    defaults = {"prompt": CIRCLE, "height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3}
    defaults |= {"max_sequence_length": 32, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe(**(defaults | kwargs)).frames


def assert_equal_latents(pair, **kwargs) -> torch.Tensor:
    """Both pipelines' latents are the same bits; returns them."""
    stock, ours = generate(pair.stock, **kwargs), generate(pair.ours, **kwargs)
    assert stock.dtype == ours.dtype
    assert torch.equal(stock, ours)
    return ours


def _calls():
    """Every combination of arguments; of a short list, in which each pair of values occurs, all but it are slow."""
    short = {("unipc", 1.0, 64, CIRCLE), ("unipc", 4.0, 96, CIRCLE), ("unipc", 4.0, 64, SQUARES)}
    short |= {("flow_match_euler", 4.0, 64, CIRCLE), ("flow_match_euler", 1.0, 96, SQUARES)}
    for call in product(NOISE_SCHEDULERS, (1.0, 4.0), (64, 96), (CIRCLE, SQUARES)):
        yield pytest.param(*call, marks=() if call in short else pytest.mark.slow)


@pytest.mark.parametrize(("noise_scheduler", "guidance_scale", "height", "prompt"), list(_calls()))
def test_latents_and_frames_are_equal(pair, noise_scheduler, guidance_scale, height, prompt):
    for pipe in pair:
        pipe.scheduler = NOISE_SCHEDULERS[noise_scheduler]()
    kwargs = {"prompt": prompt, "height": height, "guidance_scale": guidance_scale}
    latents: list[torch.Tensor] = []

    def keep(pipe, step, timestep, tensors):
        latents.append(tensors["latents"])
        return tensors

    stock, ours = (generate(pipe, output_type="np", callback_on_step_end=keep, **kwargs) for pipe in pair)
    assert stock.shape == ours.shape == (1, 5, height, 64, 3)
    assert np.array_equal(stock, ours)
    for theirs, mine in zip(latents[:3], latents[3:], strict=True):
        assert torch.equal(theirs, mine)
    assert latents[-1].shape[2:] == (2, height // 8, 8)


@pytest.mark.parametrize("name", ["random", "random-expand"])
def test_bfloat16_is_cast_at_the_same_places(pair_of, name):
    pair = pair_of(name, torch.bfloat16)
    assert assert_equal_latents(pair, negative_prompt=SQUARES).isfinite().all()
    stock, ours = (generate(pipe, output_type="pt") for pipe in pair)
    assert torch.equal(stock, ours)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("guidance_scale_2", [None, 2.0])
@pytest.mark.parametrize("noise_scheduler", NOISE_SCHEDULERS)
def test_two_experts(pair_of, noise_scheduler, guidance_scale_2):
    pair = pair_of("random-two-experts")
    for pipe in pair:
        pipe.scheduler = NOISE_SCHEDULERS[noise_scheduler]()
    forwards = {"transformer": 0, "transformer_2": 0}
    with pytest.MonkeyPatch.context() as patch:
        for expert in forwards:
            model = getattr(pair.ours, expert)

            def counted(*args, _forward=model.forward, _expert=expert, **kwargs):
                forwards[_expert] += 1
                return _forward(*args, **kwargs)

            patch.setattr(model, "forward", counted)
        generate(pair.ours, num_inference_steps=6, guidance_scale=4.0, guidance_scale_2=guidance_scale_2)
    assert min(forwards.values()) > 0, "both experts must work, or the test shows nothing"
    assert sum(forwards.values()) == 12
    assert_equal_latents(pair, num_inference_steps=6, guidance_scale=4.0, guidance_scale_2=guidance_scale_2)


@pytest.mark.one_in(3)
def test_a_callback_sees_and_changes_the_same(pair):
    seen: dict[type, list[tuple]] = {}

    def change(pipe, step, timestep, tensors: Mapping[str, torch.Tensor]):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        seen.setdefault(type(pipe), []).append((step, float(timestep), float(pipe.current_timestep), shapes))
        if step == 1:
            return {"latents": tensors["latents"] * 0.5, "prompt_embeds": -tensors["prompt_embeds"]}
        return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] + 1}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    watched = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    changed = assert_equal_latents(pair, **watched)
    assert seen[WanPipeline] == seen[EditWanPipeline]
    assert [step for step, *_ in seen[EditWanPipeline]] == [0, 1, 2]
    assert not torch.equal(changed, generate(pair.ours))


def callback_of(change, *names):
    """One of diffusers' own kind; `change` is given the pipeline and the tensors of these names."""

    class Callback(PipelineCallback):
        tensor_inputs = names

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return change(pipeline, callback_kwargs) or callback_kwargs

    return Callback()


def guidance(scale):
    return callback_of(lambda pipe, _: setattr(pipe, "_guidance_scale", scale), "latents")


DOUBLE = callback_of(lambda _, given: {name: 2 * given[name] for name in given}, "latents", "prompt_embeds")


def test_a_callback_does_not_change_the_guidance_scale(pair):
    assert torch.equal(assert_equal_latents(pair, callback_on_step_end=guidance(9.0)), generate(pair.ours))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("callback", [guidance(0.0), MultiPipelineCallbacks([guidance(0.0), DOUBLE])])
def test_pipeline_callbacks_bring_their_tensor_inputs(pair, callback):
    changed = assert_equal_latents(pair, callback_on_step_end=callback)
    assert not torch.equal(changed, generate(pair.ours))


@pytest.mark.one_in(3)
def test_interrupt_skips_the_remaining_steps_and_no_error_outlasts_its_call(pair):
    steps: list[int] = []

    def fail(pipe, step, timestep, tensors):
        raise InterruptedError

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    interrupted = assert_equal_latents(pair, callback_on_step_end=interrupt)
    assert steps == [0, 1, 0, 1]
    assert not torch.equal(interrupted, generate(pair.ours)), "the next call must not be interrupted"
    with pytest.raises(InterruptedError):
        generate(pair.ours, callback_on_step_end=fail)
    assert_equal_latents(pair)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance_scale_2": 2.0}, "boundary_ratio"),
        ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_what_diffusers_refuses_is_refused(pair_of, wrong, said):
    for pipe in pair_of("random"):
        with pytest.raises(ValueError, match=said):
            generate(pipe, **wrong)


@pytest.mark.one_in(3)
def test_several_videos_and_prompts(pair):
    assert len(assert_equal_latents(pair, num_videos_per_prompt=2)) == 2
    both = {"prompt": [CIRCLE, SQUARES], "negative_prompt": [SQUARES, CIRCLE]}
    assert len(assert_equal_latents(pair, num_videos_per_prompt=2, **both)) == 4
    made = [generate(pipe, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **both) for pipe in pair]
    assert torch.equal(*made)


def test_given_latents_and_embeddings(pair):
    with torch.no_grad():
        cond, uncond = pair.ours.encode_prompt(SQUARES, CIRCLE, max_sequence_length=32)
    channels = pair.ours.transformer.config.in_channels
    noise = torch.randn(1, channels, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    given = {"prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond, "latents": noise}
    by_embedding = assert_equal_latents(pair, **given)
    by_prompt = generate(pair.ours, prompt=SQUARES, negative_prompt=CIRCLE, latents=noise, max_sequence_length=32)
    assert torch.equal(by_embedding, by_prompt)


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (6, 5), (8, 9), (0, 1)])
def test_num_frames_is_rounded_alike(pair_of, asked, made):
    pair = pair_of("random")
    assert assert_equal_latents(pair, num_frames=asked).shape[2] == (made - 1) // 4 + 1


def test_diffusers_caches_find_their_context(pair_of):
    """Their hooks read branch, step and sigma from `cache_context`; without it they raise or decide otherwise."""
    for config in (FirstBlockCacheConfig(threshold=0.5), SeaCacheConfig(threshold=5.0)):
        pair = pair_of("random")
        plain = generate(pair.ours, num_inference_steps=8)
        pair.ours.transformer.enable_cache(config)
        cached = assert_equal_latents(pair, num_inference_steps=8)
        pair.ours.transformer.disable_cache()
        assert not torch.equal(cached, plain), "the cache never skipped, so the test shows nothing"


@pytest.mark.parametrize("noise_scheduler", NOISE_SCHEDULERS)
def test_the_progress_bar_ends_at_its_total(pair_of, noise_scheduler):
    shown = []
    for pipe in pair_of("random"):
        pipe.scheduler = NOISE_SCHEDULERS[noise_scheduler]()
        text = io.StringIO()
        pipe.set_progress_bar_config(file=text, mininterval=0)
        generate(pipe)
        shown.append(re.findall(r"(\d+)/(\d+)", text.getvalue()))
    assert shown[0][-1] == shown[1][-1] == ("3", "3")
