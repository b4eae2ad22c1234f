"""Edits by unit hooks: each acts once on each use, stored residuals stay as they were computed, mistakes are said."""

from functools import partial

import pytest
import torch

from edit_ray.cache import CPUOffloadStore, apply_cache_on_transformer, remove_cache_from_transformer
from tests.unit import cached

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
latents = partial(cached.latents, num_inference_steps=STEPS)


def masked():
    return cached.Mask((True, False, False, True), timestep_only=False)


def in_place(residual):
    residual.mul_(0.5)
    return residual


def added_by_first_unit(pipe, edit):
    """What the first unit adds at each step of a loop over one input, and what is stored of it by then."""
    model, hidden, added, stored = pipe.transformer, {}, [], []
    cache = apply_cache_on_transformer(model, masked(), STEPS, "per_block")

    def watch(ctx):
        hidden[ctx.unit_index] = ctx.hidden.clone()
        if ctx.unit_index == 1:
            added.append(hidden[1] - hidden[0])
            stored.append(cache.store.get((0, "transformer", "cond", 0, max(s for s in (0, 3) if s <= ctx.step))))
        return edit if ctx.unit_index == 0 else None

    cache.on_unit(watch)
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 32),
    }
    for step in range(STEPS):
        with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=STEPS):
            model(**inputs)
    remove_cache_from_transformer(model)
    return torch.stack(added), torch.stack(stored)


@pytest.mark.parametrize("edit", [lambda x: 0.5 * x, in_place, lambda x: torch.mul(x, 0.5, out=x)])
def test_an_edit_acts_once_on_each_use_and_never_on_what_is_stored(pipe, edit):
    plain, stored = added_by_first_unit(pipe, None)
    edited, stored_edited = added_by_first_unit(pipe, edit)
    assert torch.equal(stored_edited, stored)
    torch.testing.assert_close(edited, 0.5 * plain, rtol=1e-5, atol=1e-6)  # computed, reused, reused, computed


@pytest.mark.parametrize("granularity", ["stack", "per_block"])
@pytest.mark.parametrize("policy", [masked(), "fbcache", "taylorseer"])
def test_an_edit_in_place_equals_one_that_returns_another_tensor(pipe, granularity, policy):
    if (policy, granularity) == ("fbcache", "per_block"):
        granularity = 2

    def edited(edit):
        pipe.enable_cache(policy, STEPS, granularity)
        pipe.cache.on_unit(lambda ctx: edit)
        made = latents(pipe)
        pipe.disable_cache()
        return made

    assert torch.equal(edited(in_place), edited(lambda x: 0.5 * x))
    assert torch.equal(edited(lambda x: x.clone()), edited(lambda x: x))


def test_edits_of_several_hooks_act_one_after_the_other(pipe):
    def edited(*edits):
        pipe.enable_cache(masked(), STEPS)
        for edit in edits:
            pipe.cache.on_unit(lambda ctx, edit=edit: edit)
        made = latents(pipe)
        pipe.disable_cache()
        return made

    assert torch.equal(edited(lambda x: 2 * x, lambda x: x + 1), edited(lambda x: 2 * x + 1))


@pytest.mark.parametrize("store", [None, "host"])
def test_what_a_hook_reads_is_its_own(pipe, store):
    def made(hook):
        pipe.enable_cache(masked(), STEPS, history_len=2, store=CPUOffloadStore() if store else None)
        pipe.cache.on_unit(hook)
        result = latents(pipe)
        pipe.disable_cache()
        return result

    def spoil(ctx):
        for residual in (ctx.read_residual(), *(residual for _, residual in ctx.history())):
            if residual is not None:
                residual.zero_()

    assert torch.equal(made(spoil), made(lambda ctx: None))


WRONG = {
    "no dimension": lambda x: x.new_zeros(()),
    "features alone": lambda x: x.new_zeros(x.shape[-1:]),
    "one of each": lambda x: x.new_zeros(1, 1, x.shape[-1]),
    "another batch": lambda x: torch.cat([x, x]),
    "more tokens": lambda x: torch.cat([x, x[:, :1]], 1),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("how", ["in place of the blocks", "computed", "reused"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_tensor_of_another_shape_or_dtype_is_refused_by_name(pipe, wrong, how):
    before = latents(pipe)
    pipe.enable_cache(masked(), STEPS)
    step = 1 if how == "reused" else 0
    seen = []

    def hook(ctx):
        seen.append(ctx.hidden)
        if ctx.step != step:
            return None
        return wrong(ctx.hidden) if how == "in place of the blocks" else wrong

    pipe.cache.on_unit(hook)
    with pytest.raises(ValueError, match="unit hook returned a tensor") as caught:
        latents(pipe)
    given, said = wrong(seen[0]), str(caught.value)
    assert f"{list(given.shape)} of {given.dtype} " in said
    assert f"it must be {list(seen[0].shape)} of {seen[0].dtype} " in said
    assert pipe.cache is None
    assert torch.equal(latents(pipe), before)


def test_an_edit_that_returns_nothing_is_refused(pipe):
    pipe.enable_cache(masked(), STEPS)
    pipe.cache.on_unit(lambda ctx: lambda residual: None)
    with pytest.raises(TypeError, match=r"The function of a unit hook returned None; it must return a tensor \["):
        latents(pipe)
    assert pipe.cache is None
