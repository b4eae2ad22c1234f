"""Offloaded blocks on a GPU: copies and computing overlap, and every bit stays."""

from functools import partial

import pytest
import torch

from edit_ray.cache.device_slots import AHEAD
from edit_ray.testing import save_random_wan
from tests import calls
from tests.unit.test_offload import MASK, STEPS, sizes

latents = partial(calls.latents, **calls.AS_TRAINED, num_inference_steps=STEPS)


@pytest.mark.parametrize("slots", [AHEAD + 1, 9, 14])
@pytest.mark.parametrize("policy", [None, ("schedule", {"mask": MASK}), ("fbcache", {"rel_l1_thresh": 0.3})])
def test_bits_are_those_of_resident_blocks(tmp_path, policy, slots):
    folder = save_random_wan(tmp_path / "wan", num_layers=16, two_experts=True)
    pipe = calls.load(folder, device="cuda")
    if policy is not None:
        pipe.enable_cache(policy[0], STEPS, **policy[1])
    expected = latents(pipe)
    block, others = sizes(pipe)
    pipe.enable_block_offload("cuda", others + slots * block)
    for _ in range(3):
        assert torch.equal(latents(pipe), expected)
    assert pipe.block_offload.copied_bytes > 0
    assert all(tensor.device.type == "cpu" for tensor in pipe.transformer.blocks.parameters())


@pytest.mark.parametrize("policy", [None, ("schedule", {"mask": MASK})])
def test_fast_is_that_of_resident_blocks(tmp_path, policy):
    folder = save_random_wan(tmp_path / "wan", num_layers=16, two_experts=True)
    pipe = calls.load(folder, device="cuda", torch_dtype=torch.bfloat16)
    pipe.use_mode("fast")
    if policy is not None:
        pipe.enable_cache(policy[0], STEPS, **policy[1])
    expected = latents(pipe)
    block, others = sizes(pipe)
    pipe.enable_block_offload("cuda", others + 6 * block)
    for _ in range(2):
        assert torch.equal(latents(pipe), expected)
    assert pipe.precompute._fast["transformer"].offloaded


def test_a_page_locked_block_takes_what_it_has(tmp_path):
    pipe = calls.load(save_random_wan(tmp_path / "wan", num_layers=4), device="cuda")
    block, others = sizes(pipe)
    pipe.enable_block_offload("cuda", others + 3 * block)
    kept = pipe.block_offload._blocks["transformer", 0]
    assert kept.memory.is_pinned()
    assert kept.memory.nbytes == block
