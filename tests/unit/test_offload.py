"""Blocks in host memory: the same bits, the bytes that the plan says, and the same weights afterwards."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.cache.device_slots import AHEAD, plan_loads
from edit_ray.cache.loop_position import LoopStep
from edit_ray.engine.offload import uses_of_loop
from edit_ray.engine.options import ModelOptions, SamplingOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.testing import save_random_wan
from tests import calls

STEPS, LAYERS = 6, 8
MASK = [True, False, True, False, True, False]


@given(
    uses=st.lists(st.tuples(st.sampled_from(["transformer", "transformer_2"]), st.integers(0, 5)), max_size=60),
    slots=st.integers(AHEAD + 1, 14),
    contents=st.lists(st.integers(0, 5), max_size=14, unique=True),
)
def test_every_use_finds_its_block(uses, slots, contents):
    held = [("transformer", position) for position in contents[:slots]]
    held += [None] * (slots - len(held))
    plan = plan_loads(uses, held)
    loads = list(plan.loads)
    assert [load.after for load in loads] == sorted(load.after for load in loads)
    for index, (block, slot) in enumerate(zip(uses, plan.slots, strict=True)):
        while loads and loads[0].after <= index:  # all that may have begun
            load = loads.pop(0)
            held[load.slot] = load.item
        assert held[slot] == block
    assert not loads


@pytest.mark.parametrize(("blocks", "slots"), [(40, 20), (40, 3), (8, 8)])
def test_slots_keep_their_blocks_but_for_those_of_the_copies_under_way(blocks, slots):
    uses = [("transformer", position) for _ in range(20) for position in range(blocks)]
    kept = slots if slots == blocks else slots - AHEAD - 1
    assert len(plan_loads(uses, [None] * slots).loads) <= kept + 20 * (blocks - kept)


def test_copies_begin_two_uses_early():
    uses = [("transformer", position % 5) for position in range(30)]
    loads = plan_loads(uses, [None] * (AHEAD + 1)).loads
    assert [load.after for load in loads] == [max(0, index - AHEAD) for index in range(30)]


def test_a_loop_uses_what_a_mask_computes():
    steps = [LoopStep("transformer", torch.tensor(900.0)), LoopStep("transformer_2", torch.tensor(100.0))]
    units = {"transformer": [range(2), range(2, 3)], "transformer_2": [range(1), range(1, 3)]}
    mask = {("transformer", "cond", 0): (True, None), ("transformer", "cond", 1): (False, None)}
    mask |= {("transformer_2", "cond", 0): (None, True), ("transformer_2", "cond", 1): (None, False)}
    used = uses_of_loop(steps, ("cond",), units, mask)
    assert used == [("transformer", 0), ("transformer", 1), ("transformer_2", 0)]
    assert len(uses_of_loop(steps, ("cond", "uncond"), units, None)) == 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return calls.load(save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=LAYERS, two_experts=True))


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.disable_cache()
    loaded.disable_block_offload()


latents = partial(calls.latents, num_inference_steps=STEPS, guidance_scale=4.0)


def sizes(pipe):
    """Bytes of one block as it lies in memory, and of all that is no block."""
    experts = [expert for expert in (pipe.transformer, pipe.transformer_2) if expert is not None]
    inside = [tensor for expert in experts for tensor in expert.blocks.parameters()]
    whole = [tensor for expert in experts for tensor in (*expert.parameters(), *expert.buffers())]
    others = sum(tensor.nbytes for tensor in whole) - sum(tensor.nbytes for tensor in inside)
    return sum(-(-tensor.nbytes // 256) * 256 for tensor in pipe.transformer.blocks[0].parameters()), others


@pytest.mark.parametrize("slots", [AHEAD + 1, 6, 2 * LAYERS])
@pytest.mark.parametrize("policy", [None, ("schedule", {"mask": MASK}), ("fbcache", {"rel_l1_thresh": 0.3})])
def test_bits_are_the_same_and_weights_come_back(pipe, policy, slots):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    if policy is not None:
        pipe.enable_cache(policy[0], STEPS, **policy[1])
    expected = latents(pipe)
    block, others = sizes(pipe)
    pipe.enable_block_offload("cpu", others + slots * block)
    for _ in range(2):
        assert torch.equal(latents(pipe), expected)
    pipe.disable_block_offload()
    assert torch.equal(latents(pipe), expected)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_a_mask_skips_is_not_copied(pipe):
    block, others = sizes(pipe)
    pipe.enable_block_offload("cpu", others + (AHEAD + 1) * block)
    latents(pipe)
    whole, pipe.block_offload.copied_bytes = pipe.block_offload.copied_bytes, 0
    assert whole <= STEPS * 2 * LAYERS * block
    cache = pipe.enable_cache("schedule", STEPS, mask=MASK)
    latents(pipe)
    counts = cache.stats.values()
    computed = sum(count.computed for count in counts)
    assert computed < 0.7 * (computed + sum(count.skipped for count in counts))
    assert pipe.block_offload.copied_bytes <= computed * LAYERS * block


def test_a_run_has_its_blocks_in_host_memory(tmp_path):
    """And both experts in turn, in the room of one."""
    folder = save_random_wan(tmp_path / "wan", num_layers=LAYERS, two_experts=True)
    sampling = SamplingOptions(height=32, width=32, num_frames=5, num_inference_steps=4)
    model = ModelOptions(path=str(folder), device="cpu")
    found = []
    for offload in ({}, {"offload": "blocks", "device_bytes": 250_000}):
        engine = SegmentEngine.load(model.model_copy(update=offload), torch.get_num_threads())
        found.append(engine.denoise(sampling, prompt="a red circle", seed=1))
    assert torch.equal(*found)
    assert engine.pipe.block_offload.copied_bytes > 0
    weights = sum(t.nbytes for e in (engine.pipe.transformer, engine.pipe.transformer_2) for t in e.parameters())
    assert weights > 250_000


def test_a_forward_that_no_loop_announced_is_computed(pipe):
    inputs = (torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 8, 32))
    with torch.no_grad():
        expected = pipe.transformer(*inputs)[0]
        block, others = sizes(pipe)
        pipe.enable_block_offload("cpu", others + (AHEAD + 1) * block)
        for _ in range(2):
            assert torch.equal(pipe.transformer(*inputs)[0], expected)


def test_what_is_wrong_is_one_sentence(pipe):
    block, others = sizes(pipe)
    with pytest.raises(ValueError, match=f"{others + 2 * block} bytes are too few for the weights on the device"):
        pipe.enable_block_offload("cpu", others + 2 * block)
    pipe.enable_block_offload("cpu", others + 3 * block)
    with pytest.raises(ValueError, match="offloaded already"):
        pipe.enable_block_offload("cpu", others + 3 * block)
