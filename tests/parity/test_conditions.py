"""Pictures, videos, masks and references: the bits of diffusers' image, video and VACE pipelines, cached and not."""

import copy
import inspect
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edit_ray import EditWanPipeline
from edit_ray.cache import apply_cache_on_transformer
from edit_ray.cache.loop_position import StepCounter
from edit_ray.engine.vae_stream import encode_still
from edit_ray.testing import save_random_wan
from tests import calls
from tests.calls import cached, quiet
from tests.parity.test_cache_matrix import MATRIX, OPTIONS
from tests.unit.test_offload import sizes

FRAMES, STEPS = 9, 6


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 48, 3), dtype=np.uint8))


ONE, TWO = {"image": picture(0)}, {"image": picture(0), "last_image": picture(1)}
VIDEO = [picture(index) for index in range(FRAMES)]
MASK = [picture(20 + index).convert("L") for index in range(FRAMES)]
CONTROL = {"video": VIDEO, "mask": MASK, "reference_images": [picture(40), picture(41)], "conditioning_scale": 0.7}
I2V, V2V, VACE = "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline"
# What is conditioned: the model, diffusers' pipeline for it, and the call's arguments.
CASES = {
    "image, Wan2.2": ({"layout": "image", "two_experts": True}, I2V, ONE),
    "first and last, Wan2.2": ({"layout": "image"}, I2V, TWO),
    "image, Wan2.1": ({"layout": "image_clip"}, I2V, ONE),
    "first and last, Wan2.1": ({"layout": "first_last_clip"}, I2V, TWO),
    "first frame, TI2V": ({"expand_timesteps": True}, I2V, ONE),
    "video": ({}, V2V, {"video": VIDEO, "strength": 0.6}),
    "video, all of it anew": ({}, V2V, {"video": VIDEO, "strength": 1.0}),
    "control, mask and references": ({"layout": "vace"}, VACE, CONTROL),
    "nothing but text, VACE": ({"layout": "vace"}, VACE, {}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    @cache
    def load(case):
        model, stock, _ = CASES[case]
        folder = save_random_wan(tmp_path_factory.mktemp("wan"), **model)
        return quiet(getattr(diffusers, stock).from_pretrained(folder)), quiet(EditWanPipeline.from_pretrained(folder))

    return load


def latents(pipe, case, **changes):
    _, stock, given = CASES[case]
    arguments = {"prompt": "a red circle", "height": 64, "width": 48, "num_inference_steps": STEPS, **given, **changes}
    if stock != V2V:
        arguments["num_frames"] = FRAMES
    return pipe(**arguments, max_sequence_length=16, output_type="latent", generator=torch.manual_seed(3)).frames


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("noise_scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_diffusers(pair, case, noise_scheduler, guidance_scale):
    stock, ours = pair(case)
    if noise_scheduler == "euler":
        stock, ours = (
            quiet(type(pipe)(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}, **config))
            for pipe, config in ((stock, settings(stock)), (ours, settings(ours)))
        )
    expected = latents(stock, case, guidance_scale=guidance_scale)
    assert torch.equal(latents(ours, case, guidance_scale=guidance_scale), expected)


def settings(pipe):
    """The arguments of a pipeline's class that are no components."""
    names = {"boundary_ratio", "expand_timesteps"} & inspect.signature(type(pipe)).parameters.keys()
    return {name: pipe.config[name] for name in names}


def test_references_are_no_frames_of_the_video(pair):
    stock, ours = pair("control, mask and references")
    shown = {"prompt": "a red circle", "height": 64, "width": 48, "num_frames": FRAMES, "num_inference_steps": 1}
    videos = [pipe(**shown, **CONTROL, generator=torch.manual_seed(3)).frames for pipe in (stock, ours)]
    assert videos[1].shape == (1, FRAMES, 64, 48, 3)
    assert np.array_equal(*videos)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("policy", "granularity"), MATRIX)
@pytest.mark.parametrize("case", ["image, Wan2.2", "first and last, Wan2.1", "control, mask and references"])
def test_a_cache_that_never_skips_changes_nothing(pair, case, policy, granularity):
    _, ours = pair(case)
    expected = latents(ours, case)
    granularity = granularity if isinstance(granularity, str) else 2  # of the blocks of these models
    with cached(ours, policy, STEPS, granularity, **OPTIONS[policy][0]):
        assert torch.equal(latents(ours, case), expected)


def test_a_video_of_fewer_steps_is_cached_by_its_own_steps(pair):
    _, ours = pair("video")  # at 0.6, 3 of 6 steps
    expected = latents(ours, "video")
    with cached(ours, "schedule", 3, mask=[True, False, True]) as cache:
        assert not torch.equal(latents(ours, "video"), expected)
        assert (cache.stats["cond"].computed, cache.stats["cond"].skipped) == (2, 1)


def test_a_picture_is_embedded_once(pair):
    _, ours = pair("image, Wan2.1")
    embedded = []
    embedder = type(ours.transformer.condition_embedder.image_embedder)
    forward = embedder.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedder, "forward", lambda self, image: embedded.append(1) or forward(self, image))
        latents(ours, "image, Wan2.1")
    assert len(embedded) == 2  # for each branch: the text is another


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("case", ["image, Wan2.2", "image, Wan2.1", "control, mask and references"])
def test_steps_are_counted_where_diffusers_pipelines_do_not_say_them(pair, case, guidance_scale):
    stock, ours = pair(case)
    mask = [True, False, True, False, True, True]
    with cached(ours, "schedule", STEPS, mask=mask):
        expected = latents(ours, case, guidance_scale=guidance_scale)
    experts = {name: part for name, part in stock.components.items() if part and name.startswith("transformer")}
    cache = apply_cache_on_transformer(experts, "schedule", STEPS, mask=mask)
    try:
        for _ in range(2):
            assert torch.equal(latents(stock, case, guidance_scale=guidance_scale), expected)
            assert (cache.stats["cond"].computed, cache.stats["cond"].skipped) == (4, 2)
        with pytest.raises(ValueError, match="more steps than the 6"):
            latents(stock, case, num_inference_steps=STEPS + 1)
    finally:
        cache.remove()


def test_a_pipeline_that_names_no_branch_cannot_be_cached(pair):
    stock, _ = pair("video")
    cache = apply_cache_on_transformer(stock.transformer, "always", STEPS)
    try:
        with pytest.raises(ValueError, match="outside of a cache_context: branch and step are not known"):
            latents(stock, "video")
    finally:
        cache.remove()


def shown_by(pipe, case, **changes):
    """What the transformer is shown in the first forward of a loop."""
    seen = []
    handle = pipe.denoiser.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    try:
        return latents(pipe, case, **changes), seen[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("case", ["image, Wan2.2", "first and last, Wan2.2"])
def test_given_latents_stand_for_the_picture_and_zeros_for_the_rest(pair, case):
    """Stable Video Infinity's condition: [picture | latents | zeros], a mask on the first frame (and the last)."""
    _, ours = pair(case)
    given = torch.randn(1, 4, 2, 8, 6, generator=torch.manual_seed(1))
    (stock, encoded), (held, shown) = shown_by(ours, case), shown_by(ours, case, image_latents=given)
    assert not torch.equal(stock, held)
    encoded, shown = encoded["hidden_states"][:1], shown["hidden_states"][:1]
    assert torch.equal(shown[:, :8], encoded[:, :8]), "the noise and the mask"
    assert torch.equal(shown[:, 8:, :2], given)
    last = encoded[:, 8:, -1:] if "last" in case else torch.zeros(1, 4, 1, 8, 6)
    assert torch.equal(shown[:, 8:, 2:], last)
    if "last" not in case:
        assert torch.equal(latents(ours, case, image_latents=given, image=None), held)


@pytest.mark.parametrize("begins", ["image", "history", "nothing"])
def test_a_model_that_holds_latents_ends_with_the_last_image(pair, begins):
    _, ours = pair("first frame, TI2V")
    history = torch.randn(1, 4, 1, 8, 6, generator=torch.manual_seed(1))
    beginning = {"image": {}, "history": {"image": None, "history": history}, "nothing": {"image": None}}[begins]
    made, shown = shown_by(ours, "first frame, TI2V", last_image=picture(1), **beginning)
    frame = ours.video_processor.preprocess(picture(1), 64, 48)[:, :, None]
    still = encode_still(ours.vae, frame)[:, :, -1:]
    assert torch.equal(made[:, :, -1:], still)
    assert torch.equal(shown["hidden_states"][:, :, -1:], still)
    clean = (shown["timestep"][0].reshape(3, -1) == 0).all(1).tolist()
    assert clean == [begins != "nothing", False, True]
    free = latents(ours, "first frame, TI2V", **beginning)
    assert not torch.equal(made[:, :, 1], free[:, :, 1])
    assert torch.equal(made[:, :, 0], free[:, :, 0]) == (begins != "nothing")


@given(
    steps=st.integers(1, 12),
    order=st.integers(1, 2),
    branches=st.sampled_from([1, 2]),
    stops=st.lists(st.integers(1, 20)),
)
def test_every_loop_is_counted_from_0(steps, order, branches, stops):
    counter = StepCounter()
    # As Heun's scheduler, each noise level but the first comes `order` times; some loops are interrupted.
    timesteps = [float(1000 - index) for index in range(steps) for _ in range(order if index else 1)]
    for stop in [*stops, len(timesteps)]:
        for step, timestep in enumerate(timesteps[:stop]):
            for branch in ("cond", "uncond")[:branches]:
                assert counter.step(branch, timestep, len(timesteps)) == step


@pytest.mark.parametrize("stock", [I2V, V2V, VACE])
def test_it_takes_the_arguments_of_diffusers(stock):
    ours = inspect.signature(EditWanPipeline.__call__).parameters
    theirs = inspect.signature(getattr(diffusers, stock).__call__).parameters
    assert set(theirs) - set(ours) <= {"timesteps"}


@pytest.mark.parametrize("case", ["image, Wan2.2", "image, Wan2.1", "control, mask and references"])
def test_it_is_saved_as_what_diffusers_loads(pair, case, tmp_path):
    stock, ours = pair(case)
    ours.save_pretrained(tmp_path)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is type(stock)
    assert torch.equal(latents(loaded, case), latents(ours, case))


OF_TEXT, OF_VACE = "video", "control, mask and references"
AS_IMAGE = {"video": None, "strength": None, "image": picture(0)}


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (OF_TEXT, AS_IMAGE, "`image` cannot be used with a text-to-video"),
        (OF_TEXT, {"mask": MASK}, "`mask` cannot be used with a text-to-video model; it takes `video`, `strength`"),
        (OF_TEXT, {"video": None}, "there is no `video`"),
        (OF_TEXT, {"strength": 1.5}, "`strength` is 1.5; it must be above 0, up to 1"),
        (OF_TEXT, {"strength": 0.1}, "`strength` 0.1 of 6 steps leaves none"),
        (OF_TEXT, {"latents": torch.zeros(1, 4, 3, 8, 6)}, "`video` and `latents` are both given"),
        ("image, Wan2.2", {"image": None}, "`image` is missing"),
        ("image, Wan2.2", {"video": VIDEO}, "`video` cannot be used with an image-to-video model"),
        (
            "first frame, TI2V",
            {"image_latents": torch.zeros(1, 4, 1, 8, 6)},
            "`image_latents` cannot be used with a text-",
        ),
        ("image, Wan2.2", {"image_latents": torch.zeros(1, 4, 3, 8, 6)}, r"n from 1 to 2"),
        ("image, Wan2.2", {"image_latents": torch.zeros(4, 1, 8, 6)}, r"`image_latents` has the shape \(4, 1, 8, 6\)"),
        (
            "first and last, Wan2.2",
            {"image_latents": torch.zeros(1, 4, 1, 8, 6), "image": None},
            "`last_image` is encoded together with it",
        ),
        ("image, Wan2.1", {"image_latents": torch.zeros(1, 4, 1, 8, 6), "image": None}, "this model also sees CLIP's"),
        ("image, Wan2.1", {"last_image": picture(1)}, "CLIP's features of one picture are all that this model sees"),
        ("first frame, TI2V", {"history": torch.zeros(1, 4, 1, 8, 6)}, "`image` and `history` are both given"),
        (OF_VACE, {"image": picture(0)}, "`image` cannot be used with a VACE model"),
        (OF_VACE, {"conditioning_scale": [1.0, 2.0]}, r"`conditioning_scale` has the shape \(2,\)"),
    ],
)
def test_what_does_not_fit_the_model_is_one_sentence(pair, case, changes, message):
    _, ours = pair(case)
    with pytest.raises(ValueError, match=message):
        latents(ours, case, **changes)


# Few steps: explicit noise levels, and schedulers that draw fresh noise.


@pytest.mark.parametrize("noise_scheduler", ["unipc", "euler"])
def test_noise_levels_are_those_that_the_scheduler_is_given(pair, noise_scheduler):
    _, ours = pair("video")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    unshifted = {"euler": FlowMatchEulerDiscreteScheduler(shift=1.0), "unipc": UniPCMultistepScheduler(**flow)}
    ours = quiet(EditWanPipeline(**{**ours.components, "scheduler": unshifted[noise_scheduler]}))
    sigmas, seen = [0.95, 0.8, 0.5, 0.2], []
    for steps in ({"sigmas": sigmas}, {"num_inference_steps": 4}):
        calls.latents(ours, **steps)
        seen.append(ours.scheduler.sigmas.tolist())
    assert seen[0] == pytest.approx([*sigmas, 0.0])
    assert seen[1] != pytest.approx(seen[0])


@pytest.mark.parametrize("sigmas", [[], [1.1, 0.5], [0.5, 0.5], [0.5, 0.0], [0.2, 0.8]], ids=str)
def test_noise_levels_that_do_not_fall_are_one_sentence(pair, sigmas):
    with pytest.raises(ValueError, match=r"`sigmas` is .*; they must fall from at most 1 to above 0"):
        pair("video")[1]("a red circle", height=32, width=32, num_frames=5, sigmas=sigmas)


def test_fresh_noise_comes_from_the_generator(pair):
    """Each step estimates the clean latents, and noises them anew: x = (1 - sigma') (x - sigma v) + sigma' noise."""
    _, ours = pair("video")
    ours = quiet(EditWanPipeline(**{**ours.components, "scheduler": FlowMatchLCMScheduler(shift=1.0)}))
    steps, sigmas = [], [1.0, 0.75, 0.4]
    forward = ours.transformer.forward

    def watched(**inputs):
        output = forward(**inputs)
        steps.append((inputs["hidden_states"], output[0]))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.transformer, "forward", watched)
        results = [calls.latents(ours, 5, sigmas=sigmas, guidance_scale=1.0) for _ in range(2)]
    assert torch.equal(*results)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(results[0].shape, generator=generator)
    for (seen, velocity), sigma, following in zip(steps, sigmas, [*sigmas[1:], 0.0], strict=False):
        assert torch.allclose(seen, x, atol=1e-5)
        clean = x - sigma * velocity
        x = (1 - following) * clean + following * torch.randn(x.shape, generator=generator)
    assert torch.allclose(results[0], x, atol=1e-5)


@pytest.mark.parametrize("policy", [None, "schedule"])
@pytest.mark.parametrize(
    "case", ["image, Wan2.2", "image, Wan2.1", "first frame, TI2V", "control, mask and references"]
)
def test_both_branches_at_once_are_given_the_same_conditions(pair, case, policy):
    # A copy: weights in a mapped file lie at any address, where a CPU's kernels give other last bits.
    ours = quiet(copy.deepcopy(pair(case)[1]))
    found = []
    for parallel in (False, True):
        if parallel:
            ours.enable_cfg_parallel("cpu")
        if policy is not None:
            ours.enable_cache(policy, STEPS, mask=[True, True, False, True, False, True])
        found.append(latents(ours, case, guidance_scale=4.0))
        ours.disable_cache()
    ours.disable_cfg_parallel()
    assert torch.equal(*found)


@pytest.mark.parametrize(("layout", "case"), [("image", 0), ("image_clip", 2), ("vace", 7)])
def test_offloaded_blocks_are_given_the_same_conditions(tmp_path, layout, case):
    case = [*CASES][case]
    ours = quiet(EditWanPipeline.from_pretrained(save_random_wan(tmp_path, layout=layout, num_layers=5)))
    ours.transformer = copy.deepcopy(ours.transformer)
    expected, (block, others) = latents(ours, case), sizes(ours)
    ours.enable_block_offload("cpu", others + 3 * block)
    assert torch.equal(latents(ours, case), expected)
    assert ours.block_offload.copied_bytes > 0
