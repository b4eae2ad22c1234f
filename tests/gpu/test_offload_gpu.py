"""Offloaded blocks on a GPU: copies and computing overlap, and every bit stays."""

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.engine.offload import AHEAD
from edit_ray.testing import save_random_wan
from tests.unit.test_offload import MASK, STEPS, sizes


def latents(pipe):
    shape = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    return pipe("a red circle", **shape, output_type="latent", generator=torch.manual_seed(0)).frames


@pytest.mark.parametrize("slots", [AHEAD + 1, 9, 14])
@pytest.mark.parametrize("policy", [None, ("schedule", {"mask": MASK}), ("fbcache", {"rel_l1_thresh": 0.3})])
def test_bits_are_those_of_resident_blocks(tmp_path, policy, slots):
    folder = save_random_wan(tmp_path / "wan", num_layers=16, two_experts=True)
    pipe = EditWanPipeline.from_pretrained(folder, device="cuda")
    pipe.set_progress_bar_config(disable=True)
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
    pipe = EditWanPipeline.from_pretrained(folder, device="cuda", torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
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
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path / "wan", num_layers=4), device="cuda")
    block, others = sizes(pipe)
    pipe.enable_block_offload("cuda", others + 3 * block)
    kept = pipe.block_offload._blocks["transformer", 0]
    assert kept.memory.is_pinned()
    assert kept.memory.nbytes == block
