"""LoRA: fused it is W + s B A, unfused diffusers' bits; nothing computed with other weights outlives a change."""

import copy
from functools import partial

import pytest
import torch
from diffusers import WanPipeline

from edit_ray import EditWanPipeline
from edit_ray.cache.adapters import adapter_of
from edit_ray.engine.fast_transformer import FastTransformer, Functions, can_be_fast
from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.options import ModelOptions
from edit_ray.engine.precompute import can_precompute
from tests.loras import DIALECTS, save_lora
from tests.parity.test_pipeline_parity import generate

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # which several of them have
SMALL = {"height": 32, "width": 32}
latents = partial(generate, **SMALL)


@pytest.fixture(params=["random", "random-two-experts"])
def pair(request, folder_of):
    """Both pipelines with weights of their own: LoRA changes them."""
    pipes = [cls.from_pretrained(folder_of(request.param)) for cls in (WanPipeline, EditWanPipeline)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def experts(pipe):
    return [name for name in ("transformer", "transformer_2") if getattr(pipe, name) is not None]


def load(pipe, folder, dialect="diffusers", **options):
    """Load a LoRA for each expert, written for the weights as they are; returns the changes by expert and layer."""
    changes = {}
    for seed, expert in enumerate(experts(pipe)):
        file = folder / f"{expert}.safetensors"
        changes[expert] = save_lora(file, getattr(pipe, expert), dialect, seed=seed, **options)
        second = expert == "transformer_2"
        pipe.load_lora_weights(str(file), adapter_name="one", load_into_transformer_2=second)
    return changes


def weights(pipe):
    return {
        expert: {name: value.clone() for name, value in getattr(pipe, expert).state_dict().items()}
        for expert in experts(pipe)
    }


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fused_is_the_weight_and_the_product(pair, tmp_path, dialect):
    _, ours = pair
    before, plain = weights(ours), latents(ours)
    changes = load(ours, tmp_path, dialect)
    ours.set_adapters("one", 0.7)
    ours.fuse_lora(components=experts(ours))
    fused = latents(ours)
    ours.unload_lora_weights()
    for expert, made in changes.items():
        after = getattr(ours, expert).state_dict()
        assert after.keys() == before[expert].keys()
        for name, old in before[expert].items():
            layer, _, kind = name.rpartition(".")
            change = getattr(made[layer], kind) if layer in made else None
            assert torch.allclose(after[name], old if change is None else old + 0.7 * change, atol=1e-6), name
            assert change is None or not torch.equal(after[name], old)
    assert torch.equal(latents(ours), fused)
    assert not torch.allclose(fused, plain, atol=1e-3)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_unfused_has_the_bits_of_diffusers_and_unloaded_the_old_ones(pair, tmp_path, dialect):
    stock, ours = pair
    plain, made = latents(ours), []
    for pipe in pair:
        load(pipe, tmp_path, dialect)
    for weight in (1.0, 0.3):
        for pipe in pair:
            pipe.set_adapters("one", weight)
        made.append(latents(ours))
        assert torch.equal(made[-1], latents(stock))
    assert not torch.equal(*made)
    ours.disable_lora()
    assert torch.equal(latents(ours), plain)
    ours.enable_lora()
    assert torch.equal(latents(ours), made[-1])
    ours.unload_lora_weights()
    assert torch.equal(latents(ours), plain)
    assert all(map(can_precompute, (getattr(ours, expert) for expert in experts(ours))))


def test_two_of_them_fused_and_unfused_are_diffusers(pair, tmp_path):
    """What was computed before the loop is known by its weights' versions, which torch does not count here."""
    stock, ours = pair
    plain, names = latents(ours), ("one", "other")
    for seed, name in enumerate(names):
        save_lora(tmp_path / f"{name}.safetensors", ours.transformer, seed=seed)
    for pipe in pair:
        for name in names:
            pipe.load_lora_weights(str(tmp_path / f"{name}.safetensors"), adapter_name=name)
        pipe.set_adapters(["one", "other"], [0.5, -0.5])
        pipe.fuse_lora(adapter_names=["one", "other"])
    fused = latents(ours)
    assert torch.equal(fused, latents(stock))
    for pipe in pair:
        pipe.unfuse_lora()
        pipe.set_adapters("other", 1.0)
        pipe.fuse_lora(adapter_names=["other"], lora_scale=0.5)
    assert torch.equal(latents(ours), latents(stock))
    for pipe in pair:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    assert torch.equal(latents(ours), latents(stock))
    assert torch.allclose(latents(ours), plain, atol=1e-4)


def test_a_fused_lora_leaves_fast_and_precomputing_on(pair, tmp_path):
    _, ours = pair
    transformer = ours.transformer.to(torch.bfloat16)
    drawn, shapes = (
        torch.Generator().manual_seed(0),
        {"hidden_states": (1, 4, 4, 8, 8), "encoder_hidden_states": (1, 9, 32)},
    )
    inputs = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    inputs = {name: value.bfloat16() for name, value in inputs.items()} | {"timestep": torch.tensor([500])}
    fast = FastTransformer(transformer, functions=Functions())

    @torch.no_grad()
    def distance():
        exact = transformer(**inputs, return_dict=False)[0].float()
        with fast.installed():
            near = transformer(**inputs, return_dict=False)[0].float()
        return exact, ((near - exact).norm() / exact.norm()).item()

    plain, without = distance()
    load(ours, tmp_path)
    assert not can_be_fast(transformer)
    assert not can_precompute(transformer)
    ours.fuse_lora(components=experts(ours))
    for unloaded in (False, True):
        if unloaded:
            ours.unload_lora_weights()
        assert can_be_fast(transformer)
        assert can_precompute(transformer)
        fused, with_lora = distance()
        assert with_lora < 2 * without < 0.02  # both are roundings of bfloat16
        assert (fused - plain).norm() > 0.2 * plain.norm()


def test_weights_in_eight_bits_follow_a_lora(pair, tmp_path):
    _, ours = pair
    fast = FastTransformer(ours.transformer, fp8=True, functions=Functions())
    with fast.installed():
        before = fast._weights[0].down
    load(ours, tmp_path)
    ours.fuse_lora()
    with fast.installed():
        assert not torch.equal(fast._weights[0].down.weight.float(), before.weight.float())


def test_the_embedding_that_policies_watch_has_the_lora(pair, tmp_path):
    """`time_proj` is read as a weight, in float32: a LoRA on it has to be added."""
    _, ours = pair
    transformer, timestep = ours.transformer, torch.tensor([700])
    adapter = adapter_of(transformer)
    plain = adapter.embed_timestep(transformer, timestep)
    changes = load(ours, tmp_path, layers="time_proj")["transformer"]["condition_embedder.time_proj"]
    ours.set_adapters("one", 0.7)
    unfused = adapter.embed_timestep(transformer, timestep)
    expected = plain[1].flatten(1) + 0.7 * torch.nn.functional.silu(plain[0]) @ changes.weight.T
    assert torch.allclose(unfused[1].flatten(1), expected, atol=1e-5)
    assert not torch.allclose(unfused[1], plain[1], atol=1e-3)
    ours.fuse_lora(components=["transformer"])
    assert torch.allclose(adapter.embed_timestep(transformer, timestep)[1], unfused[1], atol=1e-5)


@pytest.mark.parametrize("dialect", ["diffusers", "lightx2v"])
@pytest.mark.parametrize("fuse_lora", [True, False])
def test_a_configuration_loads_what_the_library_loads(folder_of, tmp_path, dialect, fuse_lora):
    plain = EditWanPipeline.from_pretrained(folder_of("random-two-experts"))
    loras = []
    for index, expert in enumerate(["transformer", "transformer_2", "transformer_2"]):
        file = tmp_path / f"{index}.safetensors"
        save_lora(file, getattr(plain, expert), dialect, seed=index)
        loras.append({"path": str(file), "weight": 0.5 + index, "expert": expert})
    model = ModelOptions(path=str(folder_of("random-two-experts")), loras=loras, fuse_lora=fuse_lora, device="cpu")
    made = load_pipeline(model)
    for index, lora in enumerate(loras):
        second = lora["expert"] == "transformer_2"
        plain.load_lora_weights(lora["path"], adapter_name=f"lora_{index}", load_into_transformer_2=second)
    for expert, names in (("transformer", [0]), ("transformer_2", [1, 2])):
        getattr(plain, expert).set_adapters([f"lora_{i}" for i in names], [0.5 + i for i in names])
    plain.set_progress_bar_config(disable=True)
    wanted = latents(plain)
    if fuse_lora:
        assert torch.allclose(latents(made), wanted, atol=1e-4)
        assert can_be_fast(made.transformer)
    else:
        assert torch.equal(latents(made), wanted)
    assert len(made.lora_digest) == 16


# What would hold to the old weights.


def test_residuals_do_not_outlive_a_lora(pair, tmp_path):
    _, ours = pair
    load(ours, tmp_path)
    cache = ours.enable_cache("schedule", 3, mask=[True, False, True])
    latents(ours)
    assert cache.entries()
    ours.set_adapters("one", 0.5)
    assert not cache.entries()

    def weigh(pipe, step, _timestep, tensors):
        if step == 0:
            pipe.set_adapters("one", 0.25)
        return {}

    latents(ours, callback_on_step_end=weigh)
    assert [decision.reason for decision in cache.record.decisions if decision.step == 1] == ["missing"] * 2
    ours.disable_cache()


@pytest.mark.parametrize("pair", ["random-two-experts"], indirect=True)
def test_what_holds_to_the_weights_is_disabled_first(pair, tmp_path):
    _, ours = pair
    load(ours, tmp_path)
    ours.unload_lora_weights()
    ours.enable_cfg_parallel("cpu")
    with pytest.raises(ValueError, match=r"call disable_cfg_parallel\(\) first"):
        load(ours, tmp_path)
    ours.disable_cfg_parallel()
    ours.enable_block_offload("cpu", 10**9)
    with pytest.raises(ValueError, match=r"call disable_block_offload\(\) first"):
        load(ours, tmp_path)
    ours.disable_block_offload()
    ours.enable_cache("teacache", 3, coefficients=[1.0, 0.0], target_speedup=1.5)
    with pytest.raises(ValueError, match="The cache's target_speedup was reached with other weights"):
        load(ours, tmp_path)
    ours.disable_cache()
    load(ours, tmp_path)


def test_what_does_not_fit_is_one_sentence(pair, tmp_path):
    _, ours = pair
    before = latents(ours)
    small = copy.deepcopy(ours.transformer)
    small.blocks[0].ffn.net[2] = torch.nn.Linear(7, 24)
    save_lora(tmp_path / "other.safetensors", small)
    save_lora(tmp_path / "nothing.safetensors", ours.transformer, layers="no such layer")
    with pytest.raises(ValueError, match=r"of another model: its blocks.0.ffn.net.2 has 7 features in and 24 out"):
        ours.load_lora_weights(str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="matches nothing in the transformer; it holds no tensor"):
        ours.load_lora_weights({})
    with pytest.raises(ValueError, match=r"it holds text_encoder\.x\.lora_A\.weight\."):
        ours.load_lora_weights({"text_encoder.x.lora_A.weight": torch.zeros(2, 2)})
    assert torch.equal(latents(ours), before)
