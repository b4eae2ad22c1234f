"""Every policy at every granularity that it declares: never skipping is exact, known masks need no synchronisation."""

import itertools
from functools import partial

import pytest
import torch
from diffusers import WanPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from edit_ray.cache import apply_cache_on_transformer
from edit_ray.cache.policies import POLICIES
from edit_ray.cache.policies.teacache import WAN_COEFFICIENTS
from tests import calls
from tests.parity.conftest import BUILTIN

STEPS = 6
RATIOS = [1.0] * STEPS
RANKS = {branch: [None, *range(first, 2 * STEPS - 2, 2)] for first, branch in enumerate(("cond", "uncond"))}
ERRORS = [[0.1 * step, 0.3 * step] for step in range(STEPS)]
FLAT = [0.0, 0.0, 0.0, 0.0, 1.0]
TEACACHE = {"rel_l1_thresh": 0.0, "wan_variant": "t2v-1.3B"}, {"rel_l1_thresh": 2.5, "coefficients": FLAT}
# By policy: options that never skip, and options that skip a lot.
OPTIONS = {
    "always": ({}, None),
    "dicache": ({"rel_l1_thresh": 0.0}, {"rel_l1_thresh": 10.0}),
    "dmd": ({"cache_interval": 1}, {"cache_interval": 2, "disable_cache_before_step": 4}),
    "easycache": ({"thresh": 0.0}, {"thresh": 10.0, "ret_steps": 2}),
    "fbcache": ({"rel_l1_thresh": -1.0}, {"rel_l1_thresh": 10.0}),
    "foca": ({"cache_interval": 1}, {"cache_interval": 3, "disable_cache_before_step": 1}),
    "lemica": ({"reuse_error": ERRORS, "skips": 0}, {"reuse_error": ERRORS, "skips": 3}),
    "magcache": ({"threshold": 0.0, "mag_ratios": RATIOS}, {"threshold": 10.0, "mag_ratios": RATIOS}),
    "ranked": ({"skip_rank": RANKS, "skips": 0}, {"skip_rank": RANKS, "skips": STEPS}),
    "schedule": ({"mask": [True] * STEPS}, {"mask": [True, False] * (STEPS // 2)}),
    "seacache": ({"threshold": 0.0}, {"threshold": 10.0}),
    "spectrum": ({"window_size": 1, "flex_window": 0}, {"warmup_steps": 2}),
    "taylorseer": ({"cache_interval": 1}, {"cache_interval": 3, "disable_cache_before_step": 1}),
    **dict.fromkeys(("teacache", "warmstart_reuse"), TEACACHE),
}
VALUES = {"stack": "stack", "per_block": "per_block", "groups": 3}
MATRIX = [
    (name, VALUES[kind])
    for name in sorted(POLICIES.names())
    if name in OPTIONS
    for kind in ("stack", "per_block", "groups")
    if kind in (("stack", "per_block", "groups") if name == "warmstart_reuse" else POLICIES.find(name).granularities)
]
SKIPPING = [(name, granularity) for name, granularity in MATRIX if OPTIONS[name][1]]
NEVER = [(name, granularity, OPTIONS[name][0]) for name, granularity in MATRIX] + [
    ("teacache", "stack", {"wan_variant": variant, "use_ret_steps": use_ret_steps, "rel_l1_thresh": 0.0})
    for variant, use_ret_steps in itertools.product(WAN_COEFFICIENTS, [False, True])
]
CALL = {
    "prompt": "a red circle and a blue square bouncing on a black background",
    **{"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 4.0},
}
latents = partial(calls.latents, **CALL)


@pytest.fixture(scope="module")
def builtin(pair_of):
    return pair_of(BUILTIN).ours


@pytest.fixture(scope="module")
def uncached(builtin):
    return latents(builtin)


def test_every_built_in_policy_is_here():
    built_in = {name for name in POLICIES.names() if POLICIES.find(name).__module__.startswith("edit_ray.")}
    assert built_in == set(OPTIONS)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "granularity", "options"), NEVER)
def test_never_skipping_is_bit_equal_and_removal_restores(builtin, uncached, name, granularity, options):
    keys = list(builtin.transformer.state_dict())
    with calls.cached(builtin, name, STEPS, granularity, **options) as cache:
        assert torch.equal(latents(builtin), uncached)
        assert list(builtin.transformer.state_dict()) == keys
        assert {decision.decision for decision in cache.record} == {"compute"}
    assert list(builtin.transformer.state_dict()) == keys


def test_after_all_of_them_the_model_is_as_it_was(builtin, uncached):
    assert torch.equal(latents(builtin), uncached)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "granularity"), SKIPPING)
def test_under_stock_diffusers_masks_and_latents_are_the_same_and_guidance_survives(
    builtin, uncached, name, granularity
):
    """cond - uncond of a skipped step does not become zero, as it does where a state ignores the branch."""
    reused = {}

    def keep(ctx):
        if ctx.decision == "reuse" and ctx.unit_index == 0:
            reused[ctx.step, ctx.branch] = ctx.residuals.latest()

    with calls.cached(builtin, name, STEPS, granularity, **OPTIONS[name][1]) as cache:
        cache.on_unit(keep)
        ours, record = latents(builtin), cache.record
    assert not torch.equal(ours, uncached)
    both = [step for step, branch in reused if branch == "cond" and (step, "uncond") in reused]
    assert both
    assert all((reused[step, "cond"] - reused[step, "uncond"]).abs().max() > 0 for step in both)

    stock = calls.quiet(WanPipeline(**builtin.components, expand_timesteps=True))
    cache = apply_cache_on_transformer(stock.transformer, name, STEPS, granularity, **OPTIONS[name][1])
    try:
        assert torch.equal(latents(stock), ours)
        theirs, same = ([(d.step, d.branch, d.expert, d.unit, d.decision) for d in of] for of in (cache.record, record))
        assert theirs == same
    finally:
        cache.remove()


class Synchronisations(TorchDispatchMode):
    """Counts what would wait for a GPU: values that are brought to Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def synchronisations_in_the_loop(pipe):
    """Those from the end of the first step to the end of the last."""
    mode = Synchronisations()

    def count(_pipe, step, *_):
        if step == 0:
            mode.__enter__()
        if step == STEPS - 1:
            mode.__exit__(None, None, None)
        return {}

    latents(pipe, callback_on_step_end=count)
    return mode.count


@pytest.fixture(scope="module")
def without(builtin):
    """Synchronisations of a loop that has no cache."""
    return synchronisations_in_the_loop(builtin)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name",
    ["foca", "lemica", "magcache", "ranked", "schedule", "spectrum", "taylorseer", "teacache", "warmstart_reuse"],
)
def test_known_masks_are_said_before_and_need_no_synchronisation(builtin, without, name):
    with calls.cached(builtin, name, STEPS, **OPTIONS[name][1]) as cache:
        plan = cache.plan()
        assert synchronisations_in_the_loop(builtin) == without
        for branch in ("cond", "uncond"):
            assert tuple(cache.record.mask(branch)) == plan["transformer", branch, 0]


@pytest.mark.parametrize("name", ["dicache", "easycache", "fbcache", "seacache"])
def test_the_others_take_at_most_one_synchronisation_a_decision(builtin, without, name):
    with calls.cached(builtin, name, STEPS, **OPTIONS[name][1]) as cache:
        assert cache.plan() is None
        assert synchronisations_in_the_loop(builtin) - without <= 2 * (STEPS - 1)
