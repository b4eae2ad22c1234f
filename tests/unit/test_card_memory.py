"""What a run takes of a card: weights and tensors of diffusers' forwards and decoders, counted one by one."""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from edit_ray.cache.device_slots import AHEAD
from edit_ray.cache.kv_rings import KVLayout, KVRings
from edit_ray.cli.plan_cards import cached_run, card_lines
from edit_ray.config import config_of
from edit_ray.engine import decode, loading
from edit_ray.engine.card_memory import (
    CONVOLUTIONS,
    FREE,
    Run,
    card_problem,
    forward_bytes,
    kv_bytes,
    needs_of,
    place,
    vae_parameters,
)
from edit_ray.engine.offload import BlockOffload
from edit_ray.engine.options import ModelOptions
from edit_ray.errors import ConfigError, ModelError
from edit_ray.testing import VARIANTS, Variant, meta_transformer, random_transformer, save_random_wan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GB = 10**9
RUN = Run(height=480, width=832, num_frames=81, branches=2)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, but for those given."""

    def __init__(self, *known):
        super().__init__()
        self.now, self.most = 0, 0
        self._bytes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._bytes:
                storage = tensor.untyped_storage()
                self._bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, address):
        self.now -= self._bytes.pop(address)


@pytest.fixture(autouse=True)
def _attention_as_on_a_gpu(monkeypatch):
    """Its result is all that it takes there."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value, **_: torch.empty_like(query))


def configs_of(variant):
    configs = {"transformer": variant.transformer, "vae": variant.vae}
    configs |= {} if variant.boundary_ratio is None else {"transformer_2": variant.transformer}
    return configs | ({} if variant.image_encoder is None else {"image_encoder": variant.image_encoder})


def needs(name, run=RUN):
    return needs_of(configs_of(VARIANTS[name]), run, per_token=VARIANTS[name].expand_timesteps)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_counted(name):
    model = meta_transformer(name)
    wide = model._keep_in_fp32_modules
    expected = sum(tensor.nbytes for tensor in model.buffers())
    for key, parameter in model.named_parameters():
        expected += parameter.numel() * (4 if any(part in wide for part in key.split(".")) else 2)
    assert needs(name).transformers["transformer"].whole == expected
    with torch.device("meta"):
        vae = AutoencoderKLWan(**VARIANTS[name].vae)
    assert vae_parameters(VARIANTS[name].vae) == sum(parameter.numel() for parameter in vae.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "t2v-A14B" and not VARIANTS[name].causal])
def test_a_forward_takes_what_its_largest_moment_takes(name, dtype):
    """Of fewer layers than the model's, on which it does not depend."""
    sizes, dtype = {**VARIANTS[name].transformer, "num_layers": 3}, getattr(torch, dtype)
    if "vace_layers" in sizes:
        sizes["vace_layers"] = [0, 2]
    model, (frames, rows, columns) = meta_transformer(replace(VARIANTS[name], transformer=sizes)), (9, 60, 104)
    for key, parameter in model.named_parameters():
        if not any(part in model._keep_in_fp32_modules for part in key.split(".")):
            parameter.data = parameter.data.to(dtype)
    tokens, per_token = frames * rows * columns // 4, VARIANTS[name].expand_timesteps

    def empty(*shape):
        return torch.empty(1, *shape, dtype=dtype, device="meta")

    given = {"hidden_states": empty(sizes["in_channels"], frames, rows, columns)}
    given |= {"encoder_hidden_states": empty(512, 4096), "timestep": empty(*[tokens] * per_token).float()}
    if "image_dim" in sizes:
        given["encoder_hidden_states_image"] = empty(257, 1280)
    if "vace_layers" in sizes:
        given["control_hidden_states"] = empty(96, frames, rows, columns)
        given["control_hidden_states_scale"] = empty(len(sizes["vace_layers"]))[0]
    with Live(*model.parameters(), *model.buffers(), *given.values()) as live:
        model(**given)
    estimate = forward_bytes(sizes, tokens, dtype.itemsize, per_token=per_token)
    assert live.most == pytest.approx(estimate, rel=0.02)


@pytest.mark.parametrize("num_frames", [33, pytest.param(81, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "height", "width"), [("t2v-14B", 480, 832), ("ti2v-5B", 704, 1280)])
def test_a_decoder_takes_what_one_latent_takes(monkeypatch, name, height, width, num_frames):
    monkeypatch.setattr(decode, "denormalise", lambda latents, config: latents)  # it makes its numbers on a CPU
    with torch.device("meta"):
        vae = AutoencoderKLWan(**VARIANTS[name].vae).eval()
    for parameter in vae.parameters():
        parameter.data = parameter.data.bfloat16()
    factor = vae.config.scale_factor_spatial
    size = (1, vae.config.z_dim, (num_frames - 1) // 4 + 1, height // factor, width // factor)
    decoder, latents = decode.StreamingDecoder(vae), torch.empty(size, device="meta")
    with Live(*vae.parameters(), *vae.buffers(), latents) as live:
        video = decoder.decode(latents)
        del video
    found = needs(name, replace(RUN, height=height, width=width, num_frames=num_frames))
    shown = 3 * 2 * num_frames * height * width
    assert live.most == pytest.approx((found.decoder - shown) / CONVOLUTIONS + shown, rel=0.02)
    assert live.now == pytest.approx(found.decoder_state, rel=0.02)


def test_measured_on_an_h200():
    """benchmarks/results: peaks of one expert of A14B, 480×832×81, and of 1.3B, 480×832×33."""
    one = needs_of({"transformer": VARIANTS["t2v-14B"].transformer, "vae": {}}, RUN, per_token=False)
    assert one.whole + one.weights + one.forward == pytest.approx(32.73 * GB, rel=0.02)
    small = needs("t2v-1.3B", replace(RUN, num_frames=33))
    assert small.whole + small.weights + small.forward == pytest.approx(3.864 * GB, rel=0.02)
    assert small.whole + small.weights + small.decoder == pytest.approx(7.74 * GB, rel=0.02)


@given(
    name=st.sampled_from(sorted(VARIANTS)),
    card=st.floats(2, 100),
    height=st.integers(1, 50).map(lambda n: 32 * n),
    num_frames=st.integers(0, 40).map(lambda n: 4 * n + 1),
    storage=st.sampled_from(["torch_dtype", "fp8"]),
)
def test_what_is_placed_fits_and_larger_cards_hold_more(name, card, height, num_frames, storage):
    run = replace(RUN, height=height, num_frames=num_frames, storage=storage)
    found, card = needs(name, run), int(card * GB)
    placed, larger = place(found, card), place(found, 2 * card)
    if placed is None:
        assert found.least + found.beside(tiled=True) > card * (1 - FREE)
        return
    assert placed.peak <= card * (1 - FREE)
    assert larger is not None
    assert larger.tiled <= placed.tiled
    if larger.tiled == placed.tiled:
        assert (larger.device_bytes or found.whole) >= (placed.device_bytes or found.whole)
    assert placed.device_bytes is None or found.least <= placed.device_bytes <= found.whole


def test_weights_that_a_gpu_cannot_hold_are_one_sentence_before_they_are_read(model):
    found = needs("t2v-A14B")
    assert card_problem(found, 80 * GB, None) is None
    assert card_problem(found, 24 * GB, 15 * GB) is None
    problem = card_problem(found, 24 * GB, None)
    assert problem.startswith(
        "the model's weights take 57.5 GB of the GPU's 24.0; with model.offload: blocks and a model.d"
    )
    assert "the least is 3.4 GB" in card_problem(found, 3 * GB, None)
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError, match=r"model.path is .*: the model's weights take 0.0 GB of the GPU's 0.0; with"):
        loading._check_card(ModelOptions(path=str(model)), 100_000)


@pytest.mark.parametrize("layers", [4, 9])
def test_the_least_is_what_block_offload_asks_for(layers):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "num_layers": layers, "text_dim": 24}
    variant = Variant(sizes, flow_shift=3.0)
    least = needs_of(configs_of(variant), RUN, per_token=False).least
    transformer = random_transformer(variant, device=torch.device("cpu"), dtype=torch.bfloat16)
    offload = BlockOffload({"transformer": transformer}, torch.device("cpu"), least)
    assert len(offload._slots) == AHEAD + 1


@pytest.fixture
def model(tmp_path):
    return save_random_wan(tmp_path / "wan", num_layers=4, two_experts=True)


def config(model, cache=None, **of_model):
    sampling = {"height": 480, "width": 832, "num_frames": 81}
    given = {"path": str(model), "torch_dtype": "bfloat16", **of_model}
    run = {"video": {"num_segments": 1}, "prompt_segments": [{"segment": 0, "prompt": "a red circle"}]}
    return config_of({"model": given, "sampling": sampling, "cache": cache or {"policy": "fbcache"}, **run})


def test_the_table_says_what_to_set(model):
    """As the numbers are those of a toy, its cards are small."""
    assert [line.split()[-1] for line in card_lines(config(model), (2, 1))[2:4]] == ["nothing", "nothing"]
    lines = card_lines(config(model), (0.3, 0.15, 0.001))
    assert "tiled" in lines[2]
    assert "num_frames" in lines[3]
    assert lines[4].endswith("too small at any num_frames")
    assert all(len(line) <= 100 for line in lines)


def test_too_few_bytes_for_blocks_are_one_sentence(model):
    assert config(model, offload="blocks", device_bytes=300_000).model.offload == "blocks"
    with pytest.raises(ConfigError, match=r"model.device_bytes is 30000; it must be at least [0-9]+: 3 blocks, and"):
        config(model, offload="blocks", device_bytes=30_000)


def test_a_causal_window_takes_what_its_rings_take():
    """Of causal-1.3B at 480 x 832 pixels: the sizes of the published model, and of the library's own window."""
    configs = {"transformer": dict(meta_transformer("causal-1.3B").config), "vae": {}}
    run = Run(480, 832, 81, 1, window=12, chunk_size=3, rotated_keys=True)
    layout = KVLayout(30, 1, 4680, 12, 128, 4, torch.bfloat16, torch.device("meta"), rotated_keys=True)
    rings = KVRings(layout, ("cond",))
    assert kv_bytes(configs["transformer"], run, 8, 3) == 30 * layout.entry_bytes == 862_617_600
    needs, plain = (needs_of(configs, each, per_token=False) for each in (run, replace(run, window=0, chunk_size=0)))
    assert needs.kv == rings.device_bytes == 5_175_705_600
    assert (plain.kv, needs.decoder) == (0, plain.decoder)
    assert needs.forward < plain.forward, "a chunk at a time"
    both = needs_of(configs, replace(run, branches=2, rotated_keys=False), per_token=False)
    assert both.kv == 2 * needs.kv * 2 // 3
    assert both.beside(tiled=False) - both.kv < needs.beside(tiled=False)


def test_what_easycache_keeps_is_counted_on_a_card(model):
    """Of each unit of cond one output, and latents of two steps; uncond follows."""
    large = configs_of(VARIANTS["t2v-14B"])

    def run(**cache):
        return cached_run(config(model, cache), large)

    easy, tea = run(policy="easycache"), run(policy="teacache", wan_variant="t2v-14B")
    assert (easy.entries, easy.hidden, easy.latents) == (2, 1, 2)
    assert (tea.entries, tea.hidden, tea.latents) == (2, 0, 0)
    found, other = (needs_of(large, each, per_token=False).residuals for each in (easy, tea))
    assert found - other == 2 * (21 * 30 * 52) * 5120 + 2 * 4 * 16 * 21 * 60 * 104
    each = run(policy="easycache", granularity="per_block")
    assert (each.entries, each.hidden, each.latents) == (80, 40, 80)
    probed = run(policy="dicache", granularity=10)
    assert (probed.entries, probed.hidden, probed.latents) == (16, 24, 0)
