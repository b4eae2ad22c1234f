"""The cache on a CUDA device: exact where nothing is skipped, and no synchronisation for a known mask."""

import warnings
from functools import partial

import pytest
import torch

from tests import calls
from tests.calls import AS_TRAINED

STEPS = 12
latents = partial(calls.latents, **AS_TRAINED, num_inference_steps=STEPS)
KNOWN = {
    "magcache": {"threshold": 0.3},
    "schedule": {"mask": [True, False] * (STEPS // 2)},
    "taylorseer": {},
    "spectrum": {},
    "foca": {},
    "lemica": {"reuse_error": [[0.1, 0.2]] * STEPS},
    "teacache": {"rel_l1_thresh": 0.3},
}
UNKNOWN = {
    "fbcache": {"rel_l1_thresh": 0.3},
    "dicache": {"rel_l1_thresh": 0.3},
    "seacache": {"threshold": 0.3},
    "easycache": {"thresh": 0.3, "ret_steps": 3},
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def pipe(request):
    pipe = calls.load("builtin:tiny_wan", torch_dtype=request.param, device="cuda")
    latents(pipe)  # the first loop waits for the device more often
    return pipe


@pytest.fixture(autouse=True)
def _uncached_afterwards(pipe):
    yield
    pipe.disable_cache()


def synchronisations_in_the_loop(pipe):
    """How often CUDA was waited for, from the end of the first step to the end of the last.

    torch's notice that this mode is a prototype, which comes once in a process, speaks of "synchronizing" too.
    """

    def watch(_pipe, step, *_):
        torch.cuda.set_sync_debug_mode("default" if step == STEPS - 1 else "warn")
        return {}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            latents(pipe, callback_on_step_end=watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("granularity", ["stack", "per_block", 3])
def test_never_skipping_is_bit_equal(pipe, granularity):
    before = latents(pipe)
    pipe.enable_cache("teacache", STEPS, granularity, wan_variant="t2v-1.3B", rel_l1_thresh=0.0)
    assert torch.equal(latents(pipe), before)
    pipe.disable_cache()
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("granularity", ["stack", "per_block"])
def test_a_known_mask_needs_no_synchronisation(pipe, name, granularity):
    if name == "magcache" and granularity != "stack":
        pytest.skip("magcache has meaning for the stack alone")
    without = synchronisations_in_the_loop(pipe)
    pipe.enable_cache(name, STEPS, granularity, **KNOWN[name])
    assert synchronisations_in_the_loop(pipe) == without
    assert pipe.cache.stats["cond"].skipped > 0


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_others_take_at_most_one_a_decision(pipe, name):
    without = synchronisations_in_the_loop(pipe)
    pipe.enable_cache(name, STEPS, **UNKNOWN[name])
    assert 0 < synchronisations_in_the_loop(pipe) - without <= 2 * (STEPS - 1)
