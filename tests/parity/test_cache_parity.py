"""First-Block-Cache, MagCache and SeaCache decide and give as diffusers' own hooks do on the embedded model."""

from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig

from edit_ray.cache import apply_cache_on_transformer, remove_cache_from_transformer
from tests.calls import cached, latents
from tests.parity.conftest import BUILTIN

STEPS = 12
CALL = {
    "prompt": "a red circle bouncing on a black background",
    **{"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": STEPS, "guidance_scale": 4.0},
}
CASES = [
    *(("fbcache", {"rel_l1_thresh": at}) for at in (0.2, 0.3, 0.4)),
    *(("magcache", {"threshold": at}) for at in (0.06, 0.2, 1.0)),
    *(("magcache", {"threshold": 1.0, "max_skip_steps": 4, "retention_ratio": 0.0}),),
    *(("seacache", {"threshold": at}) for at in (0.2, 0.3, 0.6)),
    *(("seacache", {"threshold": 2.0, "residual_order": 0, "max_consecutive_cached": 0, "cache_end_steps": 0}),),
]
BRANCHES = ("cond", "uncond")


generate = partial(latents, seed=3, **CALL)


@contextmanager
def computed_forwards(transformer):
    """Which forwards run the last block, cond and uncond in turns: a list of booleans, filled as they come."""
    computed = []
    handles = [
        transformer.register_forward_pre_hook(lambda module, args: computed.append(False)),
        transformer.blocks[-1].attn1.register_forward_hook(lambda module, args, out: computed.__setitem__(-1, True)),
    ]
    try:
        yield computed
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def mag_ratios(pair_of):
    """How the magnitude of the stack's residual changes from step to step, over an uncached run of the cond branch."""
    pipe, residuals = pair_of(BUILTIN).stock, []
    blocks = pipe.transformer.blocks
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args: residuals.append(-args[0])),
        blocks[-1].register_forward_hook(lambda module, args, output: residuals[-1].add_(output)),
    ]
    generate(pipe)
    for handle in handles:
        handle.remove()
    norms = [residual.norm(dim=-1) for residual in residuals[::2]]
    return [1.0] + [(now / before).mean().item() for before, now in pairwise(norms)]


def diffusers_config(policy, options):
    if policy == "fbcache":
        return FirstBlockCacheConfig(threshold=options["rel_l1_thresh"])
    if policy == "magcache":
        return MagCacheConfig(**({"max_skip_steps": 2} | options), num_inference_steps=STEPS)
    return SeaCacheConfig(**options)


# After the first of each policy they are slow.
EACH = [
    pytest.param(*case, marks=pytest.mark.slow if case[0] == before[0] else ())
    for before, case in pairwise([("", {}), *CASES])
]


@pytest.mark.parametrize(("policy", "options"), EACH, ids=str)
def test_decisions_and_latents_are_those_of_diffusers_hooks(pair_of, mag_ratios, policy, options):
    pair = pair_of(BUILTIN)
    if policy == "magcache":
        options = options | {"mag_ratios": mag_ratios}
    transformer = pair.stock.transformer
    transformer.enable_cache(diffusers_config(policy, options))
    try:
        with computed_forwards(transformer) as decisions:
            theirs = generate(pair.stock)
    finally:
        transformer.disable_cache()
    masks = {branch: decisions[turn::2] for turn, branch in enumerate(BRANCHES)}
    assert 0 < sum(decisions) < len(decisions) == 2 * STEPS, "without a skip this shows nothing"

    cache = apply_cache_on_transformer(transformer, policy, STEPS, **options)
    try:
        stock = generate(pair.stock)
        assert {branch: cache.record.mask(branch) for branch in BRANCHES} == masks
    finally:
        remove_cache_from_transformer(transformer)
    with cached(pair.ours, policy, STEPS, **options) as cache:
        ours = generate(pair.ours)
        assert {branch: cache.record.mask(branch) for branch in BRANCHES} == masks
    assert torch.equal(ours, stock)
    assert torch.equal(ours, theirs)
