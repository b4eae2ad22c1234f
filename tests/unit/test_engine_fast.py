"""The mode fast computes what diffusers does, and leaves nothing behind; so does a streamed text encoder."""

import copy
from functools import partial

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch._dynamo.utils import counters

from edit_ray import EditWanPipeline
from edit_ray.cache import apply_cache_on_transformer
from edit_ray.engine import fast_block, fast_vae
from edit_ray.engine.decode import StreamingDecoder
from edit_ray.engine.fast_transformer import FastTransformer, Functions, can_be_fast
from edit_ray.engine.loading import streamed
from edit_ray.engine.offload import BlockOffload
from edit_ray.errors import ModelError
from edit_ray.testing import Variant, fill_random, random_transformer, random_vae, save_random_wan

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
CPU = torch.device("cpu")
SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "num_layers": 3, "text_dim": 24}
TIMES = {"one": torch.tensor([500]), "per token": torch.arange(32)[None]}


@pytest.fixture
def transformer():
    return random_transformer(Variant(SIZES, flow_shift=3.0), device=CPU, dtype=torch.bfloat16)


# What a transformer is conditioned on beside the text, and the forward's arguments for it.
CLIP = {"in_channels": 36, "out_channels": 16, "image_dim": 20, "added_kv_proj_dim": 32}
KINDS = {
    "text": ({}, {}),
    "image": ({"in_channels": 36, "out_channels": 16}, {}),
    "CLIP": (CLIP, {"encoder_hidden_states_image": torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(1))}),
    "VACE": (
        {"vace_layers": [0, 1]},
        {
            "control_hidden_states": torch.randn(1, 96, 1, 8, 8, generator=torch.Generator().manual_seed(2)),
            "control_hidden_states_scale": torch.tensor([0.5, 2.0]),
        },
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    sizes, given = KINDS[request.param]
    made = random_transformer(Variant(SIZES | sizes, flow_shift=3.0), device=CPU, dtype=torch.bfloat16)
    return made, {name: value.bfloat16() for name, value in given.items()}


@torch.no_grad()
def forward_of(kind, seed=0, steps=1):
    """As a loop's: the same text in each step."""
    (transformer, given), generator = kind, torch.Generator().manual_seed(seed)
    latents = torch.randn(1, transformer.config.in_channels, 2, 8, 8, generator=generator).bfloat16()
    text = torch.randn(1, 512, 24, generator=generator).bfloat16()
    for step in range(steps):
        with transformer.cache_context("cond", step_index=step, num_inference_steps=steps):
            latents_out = transformer(latents, torch.tensor([500]), text, **given, return_dict=False)[0].float()
    return latents_out


def test_every_kind_of_condition_is_what_diffusers_computes(kind):
    exact, fast = forward_of(kind), FastTransformer(kind[0], functions=Functions())
    assert can_be_fast(kind[0])
    with fast.installed():
        assert (forward_of(kind) - exact).abs().max() < 0.06 < exact.std()
    assert torch.equal(forward_of(kind), exact)


@pytest.mark.parametrize("heads", [2, 8])  # of 8, the biases lie behind each other in an offloaded block
@pytest.mark.parametrize("masked", [False, True])
def test_offloaded_blocks_compute_the_same_in_fast(heads, masked):
    sizes = SIZES | {"num_attention_heads": heads, "num_layers": 6}
    whole = random_transformer(Variant(sizes, flow_shift=3.0), device=CPU, dtype=torch.bfloat16)
    offloaded, before = copy.deepcopy(whole), whole.state_dict()
    blocks = sum(parameter.nbytes for parameter in whole.blocks.parameters())
    around = sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers())) - blocks
    offload = BlockOffload({"transformer": offloaded}, CPU, around + blocks * 5 // 6)
    assert not can_be_fast(offloaded)
    assert can_be_fast(offloaded, offloaded=True)
    found = []
    for transformer in (whole, offloaded):
        cache = apply_cache_on_transformer(transformer, "schedule", 2, mask=[True, not masked])
        with FastTransformer(transformer, offloaded=transformer is offloaded, functions=Functions()).installed():
            found.append(forward_of((transformer, {}), steps=2))
        cache.remove()
    assert torch.equal(*found)
    offload.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in offloaded.state_dict().items())


def test_a_cache_skips_in_fast_what_it_skips_in_diffusers(kind):
    exact = forward_of(kind)
    cache = apply_cache_on_transformer(kind[0], "schedule", 2, mask=[True, False])
    with FastTransformer(kind[0], functions=Functions()).installed():
        assert (forward_of(kind, steps=2) - exact).abs().max() < 0.06
    assert (cache.stats["cond"].computed, cache.stats["cond"].skipped) == (1, 1)
    cache.remove()


@torch.no_grad()
def forward(transformer, timestep=TIMES["one"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 9, 24, generator=generator)
    return transformer(latents.bfloat16(), timestep, text.bfloat16(), return_dict=False)[0].float()


@pytest.mark.parametrize("timestep", TIMES.values(), ids=TIMES.keys())
def test_the_fast_block_computes_what_diffusers_does(transformer, timestep):
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    exact = forward(transformer, timestep)
    with FastTransformer(transformer, functions=Functions()).installed():
        fast = forward(transformer, timestep)
        other = forward(transformer, timestep, seed=1)
    assert (fast - exact).abs().max() < 0.05 < exact.std()
    assert (other - forward(transformer, timestep, seed=1)).abs().max() < 0.05
    assert torch.equal(forward(transformer, timestep), exact), "afterwards it is exact again"
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_one_graph_for_all_blocks_steps_prompts_and_loops(transformer):
    eager = partial(torch.compile, backend="eager", dynamic=False, fullgraph=True)
    functions = Functions(*map(eager, Functions()))
    fast, graphs = FastTransformer(transformer, functions=functions), []
    for seed in range(2):
        with fast.installed():
            forward(transformer, torch.tensor([900 - seed]), seed)
        graphs.append(counters["stats"]["unique_graphs"])
    apply_cache_on_transformer(transformer, "always", 1)  # which gives the blocks another class
    at = {"step_index": 0, "num_inference_steps": 1}
    with FastTransformer(transformer, functions=functions).installed(), transformer.cache_context("cond", **at):
        forward(transformer)
    assert [*graphs, counters["stats"]["unique_graphs"]] == [graphs[0]] * 3


def test_edited_weights_act_in_the_next_loop(transformer):
    fast = FastTransformer(transformer, functions=Functions())
    with fast.installed():
        forward(transformer)
    with torch.no_grad():
        transformer.blocks[0].attn1.to_k.weight.mul_(-1)
    exact = forward(transformer)
    with fast.installed():
        assert (forward(transformer) - exact).abs().max() < 0.05


def test_weights_in_eight_bits_are_made_again_when_they_change(transformer):
    fast, made = FastTransformer(transformer, fp8=True, functions=Functions()), []
    for factor in (1, 1, -1):
        with torch.no_grad():
            transformer.blocks[0].attn1.to_v.weight.mul_(factor)
        with fast.installed():
            made.append(fast._weights[0])
    assert made[0].qkv.weight is not made[2].qkv.weight
    assert torch.equal(made[0].qkv.weight[-32:].float(), -made[2].qkv.weight[-32:].float())
    assert made[0].down.weight is made[2].down.weight


def test_changed_blocks_are_left_to_diffusers(transformer):
    assert can_be_fast(transformer)
    hooked, adapted, fused = (copy.deepcopy(transformer) for _ in range(3))
    hooked.blocks[1].ffn.register_forward_hook(lambda *_: None)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    fused.blocks[0].attn1.fuse_projections()
    assert not any(map(can_be_fast, (hooked, adapted, fused, None)))


def test_a_cache_of_diffusers_that_was_taken_away_leaves_a_transformer_fast(transformer):
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert not can_be_fast(transformer)
    transformer.disable_cache()
    assert "forward" in transformer.blocks[0].__dict__
    assert can_be_fast(transformer)
    with FastTransformer(transformer, functions=Functions()).installed():
        assert torch.isfinite(forward(transformer)).all()


@torch.no_grad()
def test_eight_bits_are_close():
    generator = torch.Generator().manual_seed(0)
    layer = fast_block.Layer(torch.randn(32, 64, generator=generator) / 8, torch.randn(32, generator=generator))
    quantised = fast_block.quantise(layer)
    weight = quantised.weight.float() * quantised.scale.t()
    assert (weight - layer.weight).abs().max() < 0.04 * layer.weight.abs().max()
    x = torch.linspace(-9, 9, 2001)
    wanted = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(fast_block._gelu(x), wanted, atol=1e-6)
    assert 0.17 < wanted[x < 0].abs().amax() < 0.171, "what results of GELU are bounded by, where all are negative"


@torch.no_grad()
def test_the_fast_decoder_computes_what_diffusers_does():
    vae = random_vae()
    fill_random(vae)
    latents = torch.randn(1, 4, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    exact = StreamingDecoder(vae).decode(latents)
    with fast_vae.fast_decoder(vae, fast_vae.PLAIN):
        fast = StreamingDecoder(vae).decode(latents)
    assert (fast - exact).abs().max() < 1e-4 < exact.std()
    assert torch.equal(StreamingDecoder(vae).decode(latents), exact)
    assert not any("forward" in module.__dict__ for module in vae.modules())


@torch.no_grad()
def test_a_streamed_text_encoder_gives_the_bits_of_each_prompt_alone(tmp_path):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path))
    prompts = ["a red circle", "a blue square and a green circle bouncing", ""]
    alone = [pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0] for prompt in prompts]
    with streamed(pipe.text_encoder, CPU):
        together = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    assert torch.equal(together, torch.cat(alone))
    assert not any("forward" in module.__dict__ for module in pipe.text_encoder.modules())


def test_modes_that_cannot_be_are_named(tmp_path):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path))
    for mode, fp8, says in (("fastest", False, "exact, fast"), ("exact", True, "mode fast"), ("fast", True, "the CPU")):
        with pytest.raises(ModelError, match=says):
            pipe.use_mode(mode, fp8=fp8)
