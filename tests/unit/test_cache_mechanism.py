"""The mechanism on a small random Wan: never-skip is exact, skips do what they say, nothing leaks, removal is whole."""

from functools import partial

import pytest
import torch
from diffusers import WanPipeline

from edit_ray import EditWanPipeline
from edit_ray.cache import (
    CachePolicy,
    GPUStore,
    apply_cache_on_transformer,
    remove_cache_from_transformer,
)
from edit_ray.testing import save_random_wan
from tests.unit import cached
from tests.unit.cached import Mask, quiet

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 5
latents = partial(cached.latents, num_inference_steps=STEPS)
GRANULARITIES = ["stack", 2]


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan22")
    return save_random_wan(folder, num_layers=3, two_experts=True, boundary_ratio=0.8)


def keys(module):
    return list(module.state_dict())


def test_never_skipping_changes_no_bit_and_removal_restores_the_model(pipe):
    before, names, kinds = latents(pipe), keys(pipe.transformer), [type(m) for m in pipe.transformer.modules()]
    pipe.enable_cache(Mask(), STEPS, 2)
    assert keys(pipe.transformer) == names
    assert torch.equal(latents(pipe), before)
    assert pipe.cache.stats["cond"].computed == STEPS * 3
    pipe.disable_cache()
    assert pipe.cache is None
    assert [type(m) for m in pipe.transformer.modules()] == kinds
    assert not [name for m in pipe.transformer.modules() for name in vars(m) if "edit_ray" in name]
    assert torch.equal(latents(pipe), before)


@pytest.fixture(scope="module")
def stock(folder):
    return quiet(WanPipeline.from_pretrained(folder))


def test_a_mask_gives_the_same_under_stock_diffusers(pipe, stock):
    policy = Mask((True, False, True, False, False))
    pipe.enable_cache(policy, STEPS, 2)
    ours = latents(pipe)
    cache = apply_cache_on_transformer(stock.transformer, policy, STEPS, 2)
    assert torch.equal(latents(stock), ours)
    assert cache.record.mask() == list(policy.mask) == pipe.cache.record.mask()
    assert {d.reason for d in cache.record} == {"policy"}
    assert {d.reason for d in pipe.cache.record} == {"plan"}
    again = latents(stock)  # its call is noticed to be a new one
    assert torch.equal(again, ours)
    assert len(cache.record) == len(pipe.cache.record)
    remove_cache_from_transformer(stock.transformer)
    remove_cache_from_transformer(stock.transformer)
    pipe.disable_cache()
    assert torch.equal(latents(stock), latents(pipe))


def test_skips_are_seen_and_differ_from_no_skips(pipe):
    uncached = latents(pipe)
    seen = []
    pipe.enable_cache(Mask((True, True, False, True, False)), STEPS)
    latents(pipe, callback_on_step_end=lambda p, *a: seen.append(p.cache.stats["cond"].skipped) or {})
    assert seen == [0, 0, 1, 1, 2]
    stats = pipe.cache.stats["uncond"]
    assert (stats.computed, stats.skipped, stats.skip_rate) == (3, 2, 0.4)
    (entry,) = [entry for entry in pipe.cache.entries() if entry.key[2] == "uncond"]
    assert entry.key == (0, "transformer", "uncond", 0, 3)
    assert entry.tier == "device"
    assert stats.bytes == entry.bytes == 4 * torch.Size(entry.shape).numel()
    assert not torch.equal(latents(pipe), uncached)


def test_the_plan_is_said_before_the_loop(pipe):
    mask = (True, False, True, True, False)
    pipe.enable_cache(Mask(mask), STEPS, 2)
    plan = pipe.cache.plan()
    assert plan == {("transformer", b, u): mask for b in ("cond", "uncond") for u in range(3)}
    pipe.disable_cache()
    pipe.enable_cache(Mask(mask, timestep_only=False), STEPS)
    assert pipe.cache.plan() is None


def test_two_experts_keep_separate_counts(two_experts):
    pipe = quiet(EditWanPipeline.from_pretrained(two_experts))
    before = latents(pipe)
    pipe.enable_cache(Mask(), STEPS)
    assert torch.equal(latents(pipe), before)
    pipe.disable_cache()
    mask = (True, False, False, False, False)
    pipe.enable_cache(Mask(mask), STEPS)
    latents(pipe)
    plan = pipe.cache.plan()
    high = [m for m in plan["transformer", "cond", 0] if m is not None]
    low = [m for m in plan["transformer_2", "cond", 0] if m is not None]
    assert high
    assert low
    assert len(high) + len(low) == STEPS
    first_low = len(high)
    reasons = {(d.step, d.expert): (d.decision, d.reason) for d in pipe.cache.record if d.branch == "cond"}
    assert reasons[first_low, "transformer_2"] == ("compute", "missing")  # it has nothing of its own to reuse
    assert pipe.cache.unit_stats()["transformer_2", "cond", 0].computed == 1


def test_a_hook_that_changes_nothing_changes_nothing(pipe):
    policy = Mask((True, False, True, False, True))
    pipe.enable_cache(policy, STEPS, 2)
    before = latents(pipe)
    calls = []
    remove = pipe.cache.on_unit(lambda ctx: calls.append((ctx.step, ctx.branch, ctx.expert, ctx.unit_index)))
    assert torch.equal(latents(pipe), before)
    assert len(calls) == len(set(calls)) == STEPS * 2 * 3
    pipe.cache.on_unit(lambda ctx: lambda residual: residual)
    assert torch.equal(latents(pipe), before)
    remove()
    latents(pipe)
    assert len(calls) == 2 * STEPS * 2 * 3  # of the two calls before


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_forced_mask_equals_the_policy_with_that_mask(pipe, granularity):
    mask = (True, False, False, True, False)
    pipe.enable_cache(Mask(mask), STEPS, granularity)
    expected = latents(pipe)
    pipe.disable_cache()
    pipe.enable_cache(Mask(), STEPS, granularity)
    pipe.cache.on_unit(lambda ctx: "compute" if mask[ctx.step] else "reuse")
    assert torch.equal(latents(pipe), expected)
    assert {d.reason for d in pipe.cache.record} == {"hook"}


def test_an_edit_of_one_unit_leaves_every_earlier_output_as_it_was(pipe):
    def outputs(edit):
        seen = []
        pipe.enable_cache(Mask(), STEPS, "per_block")
        pipe.cache.on_unit(lambda ctx: seen.append((ctx.step, ctx.branch, ctx.unit_index, ctx.hidden.clone())))
        if edit:
            pipe.cache.on_unit(
                lambda ctx: (lambda r: 1.5 * r) if (ctx.step, ctx.branch, ctx.unit_index) == (2, "cond", 3) else None
            )
        latents(pipe)
        pipe.disable_cache()
        return seen

    plain, edited = outputs(False), outputs(True)
    where = next(i for i, (step, branch, unit, _) in enumerate(plain) if (step, branch, unit) == (2, "cond", 3))
    assert all(torch.equal(a[3], b[3]) for a, b in zip(plain[: where + 1], edited[: where + 1], strict=True))
    assert not torch.equal(plain[where + 1][3], edited[where + 1][3])


def test_a_hook_may_replace_the_residual(pipe):
    pipe.enable_cache(Mask(), STEPS)
    pipe.cache.on_unit(lambda ctx: torch.zeros_like(ctx.hidden) if ctx.step == 1 else None)
    latents(pipe)
    assert [d.decision for d in pipe.cache.record if d.step == 1] == ["reuse", "reuse"]


class Forgetful(GPUStore):
    """Loses what was put at the given steps."""

    def __init__(self, lost):
        super().__init__()
        self.lost = lost

    def get(self, key):
        return None if key[-1] in self.lost else super().get(key)


def test_a_store_that_loses_entries_gives_the_run_in_which_those_were_computed(pipe):
    mask = (True, False, True, False, False)
    pipe.enable_cache(Mask(mask), STEPS, store=Forgetful({0}))
    lossy = latents(pipe)
    assert [d.decision for d in pipe.cache.record if d.branch == "cond"] == ["compute"] * 3 + ["reuse"] * 2
    pipe.disable_cache()
    pipe.enable_cache(Mask(mask), STEPS)
    pipe.cache.on_unit(lambda ctx: "compute" if ctx.step == 1 else None)
    assert torch.equal(latents(pipe), lossy)


def test_nothing_crosses_from_one_call_to_the_next(pipe):
    pipe.enable_cache(Mask((False,) * STEPS), STEPS)  # only what is missing is computed
    first = latents(pipe, seed=1)
    latents(pipe, seed=2, prompt="a blue square")
    assert torch.equal(latents(pipe, seed=1), first)
    assert pipe.cache.record.mask() == [True, False, False, False, False]


@pytest.mark.parametrize("reset_first", [True, False])
def test_a_generation_reads_what_an_earlier_one_computed(pipe, reset_first):
    options = {"warm_steps": 2, "inner": "schedule", "mask": [True, False, True, False, True]}
    pipe.enable_cache("warmstart_reuse", STEPS, 2, **options)
    masks = []
    for generation in range(4):
        if reset_first:
            pipe.cache.reset(clear_store=False)
        pipe.cache.set_generation(generation)
        pipe.cache.set_reuse_window(range(max(0, generation - 2), generation))
        if not reset_first:
            pipe.cache.reset(clear_store=False)
        plan = pipe.cache.plan()
        latents(pipe, seed=generation, reset_cache=False, prefetch_reuse=True)
        masks.append(pipe.cache.record.mask())
        assert tuple(masks[-1]) == plan["transformer", "cond", 0]
        assert {entry.key[0] for entry in pipe.cache.entries()} <= {generation - 2, generation - 1, generation}
    # With a window of two every third generation computes its opening.
    assert [mask[:2] for mask in masks] == [[True, True], [False, False], [False, False], [True, True]]


def stop(_pipe, step, *_):
    if step == 2:
        raise KeyboardInterrupt
    return {}


def test_an_exception_in_the_loop_leaks_nothing(pipe, stock):
    pipe.enable_cache(Mask((False,) * STEPS), STEPS)
    apply_cache_on_transformer(stock.transformer, Mask((False,) * STEPS), STEPS)
    for one in (pipe, stock):
        expected = latents(one)
        with pytest.raises(KeyboardInterrupt):
            latents(one, seed=3, callback_on_step_end=stop)
        if one is pipe:
            assert (pipe.cache.entries(), pipe.cache.store.bytes_resident) == ([], 0)
        assert torch.equal(latents(one), expected)
    remove_cache_from_transformer(stock.transformer)


class Raises(CachePolicy):
    def should_compute(self, ctx):
        if ctx.step == 2:
            raise ZeroDivisionError
        return True


@pytest.mark.parametrize("where", ["policy", "hook"])
def test_a_policy_or_hook_that_raises_leaves_the_model_usable_and_uncached(pipe, where):
    before = latents(pipe)
    if where == "policy":
        pipe.enable_cache(Raises(), STEPS)
    else:
        pipe.enable_cache(Mask(), STEPS)
        pipe.cache.on_unit(lambda ctx: 1 / (ctx.step - 2) and None)
    with pytest.raises(ZeroDivisionError) as caught:
        latents(pipe)
    assert "uncached" in caught.value.__notes__[0]
    assert pipe.cache is None
    assert torch.equal(latents(pipe), before)
    pipe.enable_cache(Mask(), STEPS)


def test_a_forward_outside_of_a_context_or_beyond_the_loop_is_an_error(pipe):
    model = pipe.transformer
    apply_cache_on_transformer(model, Mask(), STEPS)
    inputs = (torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 8, 32))
    with pytest.raises(ValueError, match="outside of a cache_context"):
        model(*inputs)
    with (
        pytest.raises(ValueError, match="expects 0 to 4"),
        model.cache_context("cond", step_index=7, num_inference_steps=STEPS),
    ):
        model(*inputs)


def test_blocks_that_are_replaced_under_the_cache_are_noticed(pipe):
    pipe.enable_cache(Mask(), STEPS, "per_block")
    blocks = pipe.transformer.blocks
    pipe.transformer.blocks = torch.nn.ModuleList(list(blocks)[:3])
    try:
        with pytest.raises(RuntimeError, match="asked for 3 of 5 units"):
            latents(pipe)
    finally:
        pipe.transformer.blocks = blocks


def test_what_cannot_be_cached_is_refused(pipe):
    with pytest.raises(ValueError, match=r"knows no Linear; it knows .*WanTransformer3DModel"):
        apply_cache_on_transformer(torch.nn.Linear(2, 2), Mask(), STEPS)
    for granularity in (0, 6, True, "blocks", 1.5):
        with pytest.raises(ValueError, match="granularity is"):
            pipe.enable_cache(Mask(), STEPS, granularity)
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps is"):
            pipe.enable_cache(Mask(), steps)
    with pytest.raises(ValueError, match="history_len is -1"):
        pipe.enable_cache(Mask(), STEPS, history_len=-1)
    pipe.enable_cache(Mask(), STEPS)
    with pytest.raises(ValueError, match="enabled already"):
        pipe.enable_cache(Mask(), STEPS)
    with pytest.raises(ValueError, match="has a cache already"):
        apply_cache_on_transformer(pipe.transformer, Mask(), STEPS)
