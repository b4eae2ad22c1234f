"""The two branches at the same time are the two branches one after the other, bit for bit."""

import copy
import time
from functools import partial

import pytest
import torch

from edit_ray.cache import GPUStore
from edit_ray.testing import save_random_wan
from tests import calls

STEPS = 6
latents = partial(calls.latents, seed=3, num_inference_steps=STEPS)
CACHES = {
    "schedule": {"mask": [True, True, False, True, False, True]},
    "fbcache": {"rel_l1_thresh": 0.5},
    "seacache": {"threshold": 0.6, "retention_steps": 1, "cache_end_steps": 1},
    "taylorseer": {"cache_interval": 2, "max_order": 1, "disable_cache_before_step": 2},
    "spectrum": {"warmup_steps": 2},
    "dmd": {"cache_interval": 2, "disable_cache_before_step": 4},
    "foca": {"cache_interval": 2, "disable_cache_before_step": 2},
}


@pytest.fixture(scope="module", params=[False, True], ids=["one expert", "two experts"])
def pipe(request, tmp_path_factory):
    options = {"two_experts": True, "boundary_ratio": 0.8} if request.param else {}
    folder = save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=3, **options)
    return calls.load(str(folder))


@pytest.fixture(autouse=True)
def _as_it_was(pipe):
    yield
    pipe.disable_cache()
    pipe.disable_cfg_parallel()


@pytest.mark.parametrize("policy", CACHES)
def test_every_policy_makes_the_same_bits_and_the_same_decisions(pipe, policy):
    found = []
    for parallel in (False, True):
        if parallel:
            pipe.enable_cfg_parallel("cpu")
        cache = pipe.enable_cache(policy, STEPS, **CACHES[policy])
        found.append((latents(pipe), cache.record.decisions))
        pipe.disable_cache()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert any(decision.decision == "reuse" for decision in found[0][1])


@pytest.mark.parametrize(
    ("policy", "options", "who"), [("always", {"cfg_gate": 0.5}, "cfg_gate"), ("easycache", {}, "EasyCache")]
)
def test_what_needs_cond_first_is_refused(pipe, policy, options, who):
    pipe.enable_cfg_parallel("cpu")
    with pytest.raises(ValueError, match=f"^{who} needs each step's cond before its uncond, and cfg_parallel"):
        pipe.enable_cache(policy, STEPS, **options)


def test_without_a_cache_and_without_guidance_too(pipe):
    alone = {scale: latents(pipe, guidance_scale=scale) for scale in (1.0, 5.0)}
    pipe.enable_cfg_parallel("cpu")
    assert all(torch.equal(latents(pipe, guidance_scale=scale), made) for scale, made in alone.items())


def test_the_copies_share_nothing_and_leave_nothing(pipe):
    before = latents(pipe)
    pipe.enable_cfg_parallel("cpu")
    copied = pipe.cfg_parallel.transformers["transformer"]
    ours = {tensor.data_ptr() for tensor in [*pipe.transformer.parameters(), *pipe.transformer.buffers()]}
    assert not ours & {tensor.data_ptr() for tensor in [*copied.parameters(), *copied.buffers()]}
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not torch.equal(latents(pipe), before)
    pipe.disable_cfg_parallel()
    assert torch.equal(latents(pipe), before)


def test_what_fails_in_the_other_thread_fails_here(pipe):
    pipe.enable_cfg_parallel("cpu")
    cache = pipe.enable_cache("always", STEPS)

    def fails(ctx):
        if ctx.branch == "uncond" and ctx.step == 2:
            raise ZeroDivisionError("in a hook")

    cache.on_unit(fails)
    with pytest.raises(ZeroDivisionError, match="in a hook"):
        latents(pipe)
    assert pipe.cache is None


class Watched(GPUStore):
    """Takes its time, and notes how many threads were in it at once."""

    def __init__(self):
        super().__init__()
        self.inside, self.most = [], 0

    def _slowly(self, call, *arguments):
        self.inside.append(call)
        self.most = max(self.most, len(self.inside))
        time.sleep(0.0005)
        self.inside.remove(call)
        return call(*arguments)

    def put(self, key, tensor):
        self._slowly(super().put, key, tensor)

    def get(self, key):
        return self._slowly(super().get, key)


def test_a_store_is_asked_by_one_thread_at_a_time(pipe):
    pipe.enable_cfg_parallel("cpu")
    store = Watched()
    pipe.enable_cache("taylorseer", STEPS, "per_block", store, **CACHES["taylorseer"])
    latents(pipe)
    assert store.most == 1


def test_a_hook_may_look_at_the_cache_while_the_other_branch_stores(pipe):
    pipe.enable_cfg_parallel("cpu")
    cache = pipe.enable_cache("always", STEPS, "per_block", Watched())

    def look(ctx):
        if ctx.branch == "cond":
            assert cache.entries() or ctx.step == 0
            assert cache.stats or ctx.step == 0

    cache.on_unit(look)
    latents(pipe)
    assert cache.stats["cond"].computed == cache.stats["uncond"].computed > 0


def test_a_transformer_that_is_replaced_is_no_copy_of_another(pipe):
    pipe.enable_cfg_parallel("cpu")
    original, pipe.transformer = pipe.transformer, copy.deepcopy(pipe.transformer)
    try:
        with pytest.raises(ValueError, match="another transformer than enable_cfg_parallel"):
            latents(pipe)
    finally:
        pipe.transformer = original


def test_it_is_enabled_once_and_before_a_cache(pipe):
    pipe.enable_cache("always", STEPS)
    with pytest.raises(ValueError, match="A cache is enabled"):
        pipe.enable_cfg_parallel("cpu")
    pipe.disable_cache()
    pipe.enable_cfg_parallel("cpu")
    with pytest.raises(ValueError, match="enabled already"):
        pipe.enable_cfg_parallel("cpu")
    pipe.enable_cache("always", STEPS)
    with pytest.raises(ValueError, match="A cache is enabled"):
        pipe.disable_cfg_parallel()
