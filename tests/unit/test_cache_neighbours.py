"""What else is done to a transformer goes on with a cache: LoRA, compiled blocks, VACE, per-token timesteps, saving."""

import importlib.util
import json
from functools import partial

import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel, WanVACETransformer3DModel

from edit_ray import EditWanPipeline
from edit_ray.cache import (
    CPUOffloadStore,
    DiskOffloadStore,
    GPUStore,
    TieredStore,
    apply_cache_on_transformer,
    remove_cache_from_transformer,
)
from edit_ray.testing import save_random_wan
from tests.unit import cached
from tests.unit.cached import Mask, quiet

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
latents = partial(cached.latents, num_inference_steps=STEPS)
GRANULARITIES = ["stack", "per_block", 2]


@pytest.fixture(scope="module")
def expanding(tmp_path_factory):
    folder = save_random_wan(tmp_path_factory.mktemp("wan22"), expand_timesteps=True, num_layers=2)
    return quiet(EditWanPipeline.from_pretrained(folder))


@pytest.fixture
def pipe(pipe, folder):
    """With a transformer of its own, as tests change it."""
    pipe.transformer = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    return pipe


@pytest.fixture
def graphs():
    """The graphs that dynamo has compiled for `backend_of(graphs)`."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def backend_of(graphs):
    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    return keep


# Stores


@pytest.mark.parametrize("promote", [True, False])
def test_tiers_serve_the_same_residuals_and_end_empty(pipe, tmp_path, promote):
    """One residual lies on the device, one in host memory, the others on disk."""
    mask = (True, False, True, False)
    pipe.enable_cache(Mask(mask), STEPS, "per_block")
    expected = latents(pipe)
    pipe.disable_cache()
    tiers = [(GPUStore(), 1000), (CPUOffloadStore(), 1000), (DiskOffloadStore(tmp_path, allow_tmpfs=True), None)]
    store = TieredStore(tiers, promote=promote)
    pipe.enable_cache(Mask(mask), STEPS, "per_block", store=store)
    assert torch.equal(latents(pipe), expected)
    assert 0 < store.bytes_resident == sum(entry.bytes for entry in pipe.cache.entries())
    spills = store.num_spills
    assert {entry.tier for entry in pipe.cache.entries()} == {"device", "host", "disk"}
    assert store.num_spills == spills, "listing the entries moves none"
    pipe.disable_cache()
    assert (len(store), store.bytes_resident) == (0, 0)


# LoRA loading finds modules by their names, puts others in their places, and loads a state dict.


def test_a_cached_model_is_named_and_loaded_as_before(pipe):
    model = pipe.transformer
    names, modules, keys = dict(model.named_parameters()), dict(model.named_modules()), list(model.state_dict())
    pipe.enable_cache(Mask(), STEPS, "per_block")
    assert dict(model.named_parameters()) == names
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == keys
    assert model.get_submodule("blocks.1.attn1.to_q") is modules["blocks.1.attn1.to_q"]
    assert isinstance(model, WanTransformer3DModel)
    before = latents(pipe)
    halved = {key: value / 2 for key, value in model.state_dict().items()}
    assert model.load_state_dict(halved).missing_keys == []
    assert not torch.equal(latents(pipe), before)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_a_lora_that_is_loaded_under_the_cache_acts_and_goes(pipe):
    from peft import LoraConfig

    def add_lora():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "x")

    before = latents(pipe)
    add_lora()
    adapted = latents(pipe)
    pipe.transformer.delete_adapters("x")
    pipe.enable_cache(Mask(), STEPS, "per_block")
    add_lora()
    assert torch.equal(latents(pipe), adapted)
    pipe.transformer.delete_adapters("x")
    assert torch.equal(latents(pipe), before)
    assert not torch.equal(before, adapted)


# torch.compile


@pytest.mark.one_in(2)
@pytest.mark.parametrize("first", ["compiled", "cached"])
def test_compiled_blocks_are_cached_and_compiled_once_with_and_once_without_a_cache(pipe, graphs, first):
    mask, plain, needed = (True, False, True, False), latents(pipe), 0
    pipe.enable_cache(Mask(mask), STEPS, 2)
    skipping = latents(pipe)
    pipe.disable_cache()
    if first == "cached":
        pipe.enable_cache(Mask(), STEPS, 2)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend_of(graphs))
    if first == "compiled":
        assert torch.equal(latents(pipe), plain)
        needed = len(graphs)
        pipe.enable_cache(Mask(), STEPS, 2)
    assert torch.equal(latents(pipe), plain)
    compiled = len(graphs)
    assert compiled > needed == compiled // 2 or first == "cached"
    pipe.cache.policy.mask = mask
    assert torch.equal(latents(pipe), skipping)
    assert pipe.cache.record.mask() == list(mask)
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    assert len(graphs) == compiled
    if first == "compiled":
        for _ in range(2):
            pipe.disable_cache()
            assert torch.equal(latents(pipe), plain)
            pipe.enable_cache(Mask(), STEPS, "per_block")
            assert torch.equal(latents(pipe), plain)
        assert len(graphs) == compiled


def test_a_model_compiled_as_a_whole_is_refused_also_when_the_cache_is_on(pipe):
    compiled = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"compiled as a whole, which freezes every decision: compile its blocks"):
        apply_cache_on_transformer(compiled, Mask(), STEPS)
    model = pipe.transformer
    apply_cache_on_transformer(model, Mask(), STEPS)
    model.compile(backend="eager")
    inputs = (torch.randn(1, 4, 2, 4, 4), torch.tensor([500]), torch.randn(1, 8, 32))
    with (
        model.cache_context("cond", step_index=0, num_inference_steps=STEPS),
        pytest.raises(ValueError, match="compiled as a whole"),
    ):
        model(*inputs)
    remove_cache_from_transformer(model)
    with pytest.raises(ValueError, match=r"This WanTransformer3DModel is compiled as a whole.*compile_repeated_blocks"):
        pipe.enable_cache(Mask(), STEPS)
    assert pipe.cache is None


# Wan VACE adds hints between its blocks.


def vace_with(*layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanVACETransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=5,
            rope_max_seq_len=64,
            vace_layers=layers,
            vace_in_channels=8,
        ).eval()


@pytest.fixture(scope="module")
def vace():
    return vace_with(0, 1, 3, 4)


@torch.no_grad()
def forward(model, *, step=None, control=None, scale=5.0):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "control_hidden_states": torch.randn(1, 8, 2, 4, 4, generator=generator) if control is None else control,
        "control_hidden_states_scale": torch.full((len(model.config.vace_layers),), scale),
        "return_dict": False,
    }
    if step is None:
        return model(**inputs)[0]
    with model.cache_context("cond", step_index=step, num_inference_steps=STEPS):
        return model(**inputs)[0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_vace_hints_are_neither_lost_nor_added_twice(vace, granularity):
    uncached = forward(vace)
    apply_cache_on_transformer(vace, Mask((True, True, False, False)), STEPS, granularity)
    try:
        outputs = [forward(vace, step=step) for step in range(3)]
        fewer_hints = forward(vace, step=3, scale=0.0)
    finally:
        remove_cache_from_transformer(vace)
    assert torch.equal(outputs[0], uncached)
    assert torch.equal(outputs[1], uncached)
    assert (outputs[2] - uncached).abs().max() <= 1e-5 * uncached.abs().max()
    assert (fewer_hints - uncached).abs().max() > 1e-2 * uncached.abs().max()  # the hints are those of the step itself
    assert torch.equal(forward(vace), uncached)


@pytest.mark.parametrize(("granularity", "needed"), [("stack", 0), (3, 2), ("per_block", 2)])
def test_a_skipped_unit_needs_no_hints_inside_it(granularity, needed):
    """Those after a unit's last block are added to what follows, and computed with all before them."""
    model = vace_with(0, 2)
    uncached, computed = forward(model), []
    for block in model.vace_blocks:
        block.register_forward_hook(lambda *_: computed.append(1))
    apply_cache_on_transformer(model, Mask((True, False, False, False)), STEPS, granularity)
    assert torch.equal(forward(model, step=0), uncached)
    assert len(computed) == 2
    assert (forward(model, step=1) - uncached).abs().max() <= 1e-5 * uncached.abs().max()
    assert len(computed) == 2 + needed


# Wan2.2 with per-token timesteps: the clean history is at timestep 0.


@pytest.mark.parametrize("timestep_only", [True, False])
def test_a_policy_sees_the_embedding_of_the_noisy_timestep(expanding, timestep_only):
    seen = []
    for history in (None, torch.randn(1, 4, 1, 4, 4)):
        policy = Mask(timestep_only=timestep_only)
        expanding.enable_cache(policy, STEPS)
        latents(expanding, history=history)
        expanding.disable_cache()
        seen.append(policy.seen)
    without, with_history = seen
    assert [item[:2] for item in with_history] == [(step, b) for step in range(STEPS) for b in ("cond", "uncond")]
    for (*_, e, e0), (*_, other_e, other_e0) in zip(without, with_history, strict=True):
        assert torch.equal(e, other_e)
        assert torch.equal(e0, other_e0)
    assert e.shape == (1, 24)
    assert e0.shape == (1, 6, 24)
    assert len({tuple(e.flatten().tolist()) for *_, e, _ in without}) == STEPS


# Pipelines that say too little, or do not ask.


@pytest.mark.parametrize("replaced", ["blocks", "transformer"])
def test_a_cache_that_is_not_called_is_an_error(pipe, folder, replaced):
    pipe.enable_cache(Mask(), STEPS, 2)
    other = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    if replaced == "blocks":
        pipe.transformer.blocks = other.blocks
    else:
        pipe.transformer = other
    with pytest.raises(RuntimeError, match=r"asked for 0 of 3 units in one forward|never asked"):
        latents(pipe)


# Others that write the model, or that cache it.


def test_a_cached_transformer_is_saved_under_its_own_class(pipe, tmp_path):
    pipe.enable_cache(Mask(), STEPS)
    pipe.transformer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    saved = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[key], value) for key, value in pipe.transformer.state_dict().items())
    assert len(saved) == len(pipe.transformer.state_dict())
    pipe.save_pretrained(tmp_path / "whole")
    assert (
        json.loads((tmp_path / "whole" / "model_index.json").read_text())["transformer"][1] == "WanTransformer3DModel"
    )


def test_a_model_with_a_cache_of_diffusers_is_refused_until_that_is_off(pipe):
    before = latents(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="has one of diffusers' own caches; disable that first"):
        pipe.enable_cache(Mask(), STEPS)
    pipe.transformer.disable_cache()
    pipe.enable_cache(Mask(), STEPS)
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize(
    "other", [{"height": 64, "width": 32}, {"height": 64, "width": 64}, {"prompt": ["a", "b"]}], ids=str
)
def test_a_warm_start_takes_residuals_of_its_own_layout_alone(pipe, other):
    """As many tokens in another shape would be wrong silently, and two prompts would share one's."""
    first = {"height": 32, "width": 64}
    pipe.enable_cache("always", STEPS)
    expected = latents(pipe, **(first | other))
    pipe.disable_cache()
    cache = pipe.enable_cache("warmstart_reuse", STEPS, warm_steps=2, inner="always")
    for generation, (call, computed) in enumerate([(first, True), (first | other, True), (first | other, False)]):
        cache.set_generation(generation)
        cache.set_reuse_window(range(generation))
        cache.reset(clear_store=False)
        made = latents(pipe, **call, reset_cache=False)
        assert cache.record.mask()[:2] == [computed] * 2
        if generation == 1:
            assert torch.equal(made, expected)
