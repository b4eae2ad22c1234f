"""The CFG gate: late steps take uncond from cond, under every policy, and are counted as skipped."""

from functools import partial

import pytest
import torch
from diffusers import WanPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from edit_ray import EditCausalWanPipeline, EditWanPipeline
from edit_ray.cache import apply_cache_on_transformer
from edit_ray.cache.cfg_gate import CfgGate, gated_steps
from edit_ray.testing import save_random_wan
from edit_ray.tuning.videos import blocks_share
from tests.unit import cached
from tests.unit.cached import quiet

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
latents = partial(cached.latents, num_inference_steps=STEPS, guidance_scale=4.0)


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan22")
    return save_random_wan(folder, num_layers=3, two_experts=True, boundary_ratio=0.8)


class OfficialGate:
    """SGLang's `denoising.py` in words of one forward: the branches take turns, and each is computed first."""

    def __init__(self, pipe, share):
        self.first, self.count, self.delta, self.delta_of, self.reused = share * STEPS, 0, None, None, []
        models = [pipe.transformer, *filter(None, [pipe.transformer_2])]
        self.hooks = [model.register_forward_hook(self.hook) for model in models]

    def hook(self, model, args, output):
        step, is_uncond = divmod(self.count, 2)
        self.count += 1
        if not is_uncond:
            self.cond = output[0]
            return None
        if step >= self.first and self.delta_of is model:
            self.reused.append(step)
            return (self.cond - self.delta,)
        self.delta, self.delta_of = self.cond - output[0], model
        return None


def gated_by_hand(pipe, share):
    official = OfficialGate(pipe, share)
    try:
        return latents(pipe), official.reused
    finally:
        for hook in official.hooks:
            hook.remove()


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.9, 1])
@pytest.mark.parametrize("experts", [1, 2])
def test_latents_and_steps_are_the_official_ones(pipe, two_experts, share, experts):
    if experts == 2:
        pipe = quiet(EditWanPipeline.from_pretrained(two_experts))
    uncached = latents(pipe)
    expected, reused = gated_by_hand(pipe, share)
    cache = pipe.enable_cache("always", STEPS, cfg_gate=share)
    plan = cache.plan()
    made, record = latents(pipe), cache.record
    pipe.disable_cache()
    assert torch.equal(made, expected)
    assert torch.equal(made, uncached) is (reused == [])
    assert [d.step for d in record if d.reason == "gate"] == reused
    planned = {step for (_, branch, _), mask in plan.items() for step, c in enumerate(mask) if c is False}
    assert sorted(planned) == reused
    assert {d.branch for d in record if d.decision == "reuse"} <= {"uncond"}
    assert torch.equal(latents(pipe), uncached)


def test_an_expert_begins_with_a_difference_of_its_own():
    assert gated_steps(0.5, ["a"] * 6) == [False, False, False, True, True, True]
    assert gated_steps(0.0, ["a"] * 3) == [False, True, True]
    assert gated_steps(0.4, ["a", "a", "a", "b", "b"]) == [False, False, True, False, True]
    assert gated_steps(1.0, ["a", "b"]) == [False, False]


def test_a_gate_needs_a_cond_of_the_same_step_and_a_difference_of_the_same_expert():
    gate, output = CfgGate(0.5), (torch.ones(1),)
    assert gate.stand_in("a", "uncond", 2, 4) is None
    gate.saw("a", "uncond", 0, output)
    gate.saw("a", "cond", 1, (torch.full((1,), 5.0),))
    assert gate.stand_in("a", "uncond", 2, 4) is None, "no difference was seen"
    gate.saw("a", "uncond", 1, output)
    assert gate.stand_in("a", "uncond", 2, 4) is None, "cond was not seen at step 2"
    gate.saw("a", "cond", 2, (torch.full((1,), 7.0),))
    assert gate.stand_in("a", "uncond", 2, 4)[0].item() == 3.0
    assert gate.stand_in("a", "cond", 2, 4) is None
    assert gate.stand_in("a", "uncond", 2, 5) is None, "before the gate"
    gate.saw("b", "cond", 3, output)
    assert gate.stand_in("b", "uncond", 3, 4) is None
    gate.reset()
    assert gate.stand_in("a", "uncond", 2, 4) is None


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("always", {}),
        ("fbcache", {"rel_l1_thresh": 0.3}),
        ("spectrum", {"warmup_steps": 2}),
        ("easycache", {"thresh": 1.0, "ret_steps": 2}),
    ],
)
@pytest.mark.parametrize("granularity", ["stack", 2])
def test_under_stock_diffusers_it_is_the_same(folder, pipe, policy, options, granularity):
    ours = pipe.enable_cache(policy, STEPS, granularity, cfg_gate=0.5, **options)
    expected = latents(pipe)
    stock = quiet(WanPipeline.from_pretrained(folder))
    cache = apply_cache_on_transformer(stock.transformer, policy, STEPS, granularity, cfg_gate=0.5, **options)
    for _ in range(2):  # a second call begins anew
        assert torch.equal(latents(stock), expected)
        theirs, mine = ([(d.step, d.branch, d.unit, d.decision) for d in of.record] for of in (cache, ours))
        assert theirs == mine
    cache.remove()


def test_a_gated_forward_runs_nothing_asks_no_hook_and_counts_as_skipped(pipe):
    ran, asked = [], []
    hook = pipe.transformer.blocks[0].attn1.register_forward_hook(lambda *_: ran.append(1))
    cache = pipe.enable_cache("fbcache", STEPS, 2, cfg_gate=0.5, rel_l1_thresh=0.0)
    cache.on_unit(lambda ctx: asked.append((ctx.step, ctx.branch)))
    latents(pipe)
    hook.remove()
    assert len(ran) == STEPS + 3
    assert {step for step, branch in asked if branch == "uncond"} == {0, 1, 2}
    assert cache.stats["uncond"].skipped == 3 * 3
    assert cache.stats["cond"].skipped == 0
    assert blocks_share(cache) == 0.75, "no block of a probe runs there"


def test_a_target_speedup_counts_it(pipe):
    options = {"coefficients": [1.0, 0.0], "target_speedup": 2.0}
    shares = []
    for gate in (None, 0.5):
        masks = pipe.enable_cache("teacache", 20, cfg_gate=gate, **options).plan()
        pipe.disable_cache()
        shares.append({branch: sum(mask) / 20 for (_, branch, _), mask in masks.items()})
    assert shares[0]["cond"] == shares[0]["uncond"] == pytest.approx(0.5, abs=0.05)
    assert shares[1]["cond"] > shares[1]["uncond"]
    assert sum(shares[1].values()) / 2 == pytest.approx(0.5, abs=0.05)


def test_an_output_of_diffusers_class_stays_one():
    gate = CfgGate(0)
    for step, value in ((0, 3.0), (1, 4.0)):
        gate.saw("a", "cond", step, Transformer2DModelOutput(sample=torch.full((2,), value, dtype=torch.bfloat16)))
        if step == 0:
            gate.saw("a", "uncond", 0, Transformer2DModelOutput(sample=torch.ones(2, dtype=torch.bfloat16)))
    made = gate.stand_in("a", "uncond", 1, 2)
    assert type(made) is Transformer2DModelOutput
    assert (made.sample.dtype, made.sample.tolist()) == (torch.bfloat16, [2.0, 2.0])


def test_nothing_is_kept_after_a_call_and_without_guidance_nothing_happens(pipe):
    cache = pipe.enable_cache("always", STEPS, cfg_gate=0.5)
    unguided = latents(pipe, guidance_scale=1.0)
    assert cache.cfg_gate._cond is cache.cfg_gate._difference is None
    assert {d.decision for d in cache.record} == {"compute"}
    pipe.disable_cache()
    assert torch.equal(latents(pipe, guidance_scale=1.0), unguided)


@pytest.mark.parametrize("given", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_a_wrong_share_is_a_sentence(pipe, given):
    with pytest.raises(ValueError, match=r"cfg_gate is .*; it must be a number from 0 to 1, the share of the steps"):
        pipe.enable_cache("always", STEPS, cfg_gate=given)
    assert pipe.cache is None


def test_blocks_in_host_memory_make_the_same_bits(pipe):
    pipe.enable_cache("spectrum", STEPS, warmup_steps=2, cfg_gate=0.5)
    expected = latents(pipe)
    pipe.disable_cache()
    whole, block = (sum(p.nbytes for p in of.parameters()) for of in (pipe.transformer, pipe.transformer.blocks[0]))
    pipe.enable_block_offload("cpu", whole - block)
    try:
        pipe.enable_cache("spectrum", STEPS, warmup_steps=2, cfg_gate=0.5)
        assert torch.equal(latents(pipe), expected)
        pipe.disable_cache()
    finally:
        pipe.disable_block_offload()


def test_each_chunk_of_a_causal_model_begins_anew(tmp_path):
    folder = save_random_wan(tmp_path / "causal", num_layers=3, causal={"window": 9, "sink": 3})
    pipe = quiet(EditCausalWanPipeline.from_pretrained(folder))
    call = {"prompt": "a red circle", "height": 32, "width": 48, "max_sequence_length": 32, "decode": False}

    def chunks(count):
        stream = pipe.stream(**call, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
        return [next(stream).latents for _ in range(count)]

    whole = chunks(2)
    cache = pipe.enable_cache("always", 4, cfg_gate=1)
    assert all(map(torch.equal, chunks(2), whole))
    pipe.disable_cache()
    cache = pipe.enable_cache("always", 4, cfg_gate=0.5)
    gated = chunks(2)
    assert [d.step for d in cache.record if d.reason == "gate"] == [2, 3]
    assert not any(map(torch.equal, gated, whole))
