"""Transformers from single files and in fewer bits, and their blocks in host memory; files are made here."""

import json

import pytest
import torch
from safetensors.torch import save_file

from edit_ray import EditWanPipeline
from edit_ray.config import config_of
from edit_ray.engine import options
from edit_ray.engine.fast_transformer import can_be_fast
from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.model_files import ROOTS_VARIABLE, model_digest
from edit_ray.engine.options import ModelOptions
from edit_ray.errors import ConfigError, ModelError
from edit_ray.testing import Variant, make_model

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
WIDE = Variant(  # rows of whole GGUF blocks, which have 32 numbers
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "ffn_dim": 64,
        "num_layers": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "rope_max_seq_len": 64,
    },
    flow_shift=3.0,
    vae={"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    text_encoder={"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
)
ORIGINAL = {  # diffusers' names, and Wan's own; the longer ones first
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "proj_out": "head.head",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}


def original(name):
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in ORIGINAL.items():
        name = name.replace(ours, theirs)
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("wan"), WIDE, dtype=torch.float32)


@pytest.fixture(scope="module")
def whole(folder):
    return load(path=str(folder))


def load(**options):
    return load_pipeline(ModelOptions(device="cpu", **options))


def latents(pipe):
    return pipe(
        "any", height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=4.0, max_sequence_length=16,
        output_type="latent", generator=torch.manual_seed(0),
    ).frames  # fmt: skip


def unlike(found, expected):
    return float((found - expected).norm() / expected.norm())


def weights(pipe):
    return {original(name): tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def in_gguf(pipe, path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, tensor in weights(pipe).items():
        data, quantised = tensor.numpy(), tensor.ndim == 2 and tensor.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            name, gguf.quants.quantize(data, kind) if quantised else data, raw_dtype=kind if quantised else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_eight_bits(pipe, path, prefix="model.diffusion_model.", rows=False):
    """As ComfyUI writes it, with a scale for each weight, or LightX2V, with one for each row."""
    found = {}
    for name, tensor in weights(pipe).items():
        if tensor.ndim == 2 and "blocks" in name:
            scale = (tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()) / 448
            suffix = ".weight_scale" if rows else ".scale_weight"
            found[prefix + name.removesuffix(".weight") + suffix] = scale
            tensor = (tensor / scale).to(torch.float8_e4m3fn)
        found[prefix + name] = tensor
    save_file(found | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, path)
    return path


def in_wans_names(pipe, path):
    save_file(weights(pipe), path)
    return path


PROMPTS = [{"segment": 0, "prompt": "a red circle"}]
FILES = {
    "one.gguf": (in_gguf, 0.02),
    "scaled.safetensors": (in_eight_bits, 0.15),
    "rows.safetensors": (lambda pipe, path: in_eight_bits(pipe, path, "", rows=True), 0.15),
    "same.safetensors": (in_wans_names, 0.0),
}


@pytest.fixture(scope="module")
def file_of(whole, tmp_path_factory):
    made = tmp_path_factory.mktemp("files")
    return lambda name: str(FILES[name][0](whole, made / name))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("offload", ["text_encoder", "blocks"])
def test_a_single_file_takes_the_place_of_the_models_own(folder, whole, file_of, name, offload):
    _, most = FILES[name]
    blocks = {"offload": "blocks", "device_bytes": 250_000} if offload == "blocks" else {}
    pipe = load(path=str(folder), transformer=file_of(name), **blocks)
    expected, found = latents(whole), latents(pipe)
    assert unlike(found, expected) <= most
    if blocks:
        assert pipe.block_offload.copied_bytes > 0
        assert torch.equal(latents(pipe), found)
    assert can_be_fast(pipe.transformer) == (name != "one.gguf" and not blocks)


def test_a_file_in_gguf_computes_in_the_models_type(folder, whole, file_of):
    pipe = load(path=str(folder), transformer=file_of("one.gguf"), torch_dtype="bfloat16")
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.transformer.blocks[0].norm2.weight.dtype == torch.float32
    assert unlike(latents(pipe).float(), latents(whole)) < 0.1


def test_fp8_is_stored_and_computed_with_in_the_models_type(folder, whole):
    pipe = load(path=str(folder), storage="fp8")
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert pipe.transformer.condition_embedder.time_proj.weight.dtype == torch.float32
    expected, found = latents(whole), latents(pipe)
    assert 0 < unlike(found, expected) < 0.15
    assert not can_be_fast(pipe.transformer)
    offloaded = load(path=str(folder), storage="fp8", offload="blocks", device_bytes=160_000)
    for _ in range(2):
        assert torch.equal(latents(offloaded), found)
    whole_blocks = sum(tensor.nbytes for tensor in whole.transformer.blocks.parameters())
    assert sum(block.memory.nbytes for block in offloaded.block_offload._blocks.values()) < whole_blocks / 2


def test_int8_is_torchaos(folder, whole):
    pytest.importorskip("torchao")
    pipe = load(path=str(folder), storage="int8")
    assert "Int8" in type(pipe.transformer.blocks[0].attn1.to_q.weight).__name__
    expected, found = latents(whole), latents(pipe)
    assert 0 < unlike(found, expected) < 0.15
    assert not can_be_fast(pipe.transformer)


@pytest.mark.parametrize("offload", ["none", "blocks"])
def test_every_cache_reads_what_it_needs_of_quantised_weights(folder, file_of, offload):
    more = {"device_bytes": 250_000} if offload == "blocks" else {}
    pipe = load(path=str(folder), transformer=file_of("one.gguf"), offload=offload, **more)
    expected = latents(pipe)
    cache = pipe.enable_cache("teacache", 3, wan_variant="t2v-1.3B", rel_l1_thresh=1e-9)
    assert torch.equal(latents(pipe), expected)
    assert cache.stats["cond"].computed == 3


def test_a_files_digest_is_part_of_the_models(folder, file_of):
    path, same, scaled = str(folder), file_of("same.safetensors"), file_of("scaled.safetensors")
    digests = [model_digest(path), model_digest(path, [same]), model_digest(path, [scaled])]
    assert len({*digests}) == 3
    assert model_digest(path, [same]) == digests[1]
    assert model_digest("some/model") is None
    assert model_digest("some/model", [same]) is not None


def test_what_cannot_be_loaded_is_one_sentence(folder, file_of, tmp_path, monkeypatch):
    path, same = str(folder), file_of("same.safetensors")
    narrow = Variant(WIDE.transformer | {"ffn_dim": 32}, flow_shift=3.0, vae=WIDE.vae)
    other = make_model(tmp_path / "other", narrow, text_encoder="none")
    other_file = str(next((other / "transformer").glob("*.safetensors")))
    few = tmp_path / "few.safetensors"
    save_file({"blocks.0.ffn.net.2.weight": torch.zeros(32, 64)}, few)
    (tmp_path / "no.safetensors").write_text("{}")
    (tmp_path / "no.gguf").write_text("{}")
    for given, says in (
        ({"transformer": str(tmp_path / "none.safetensors")}, "is not a file"),
        ({"transformer": str(tmp_path / "no.safetensors")}, "cannot be loaded as a transformer"),
        ({"transformer": str(tmp_path / "no.gguf")}, "cannot be loaded as a transformer"),
        ({"transformer": other_file}, "size mismatch for blocks.0.ffn"),
        ({"transformer_2": same}, "the model has no transformer_2"),
        ({"transformer": str(few)}, "it has no blocks.*, nor [0-9]+ others"),
        ({"offload": "blocks", "device_bytes": 1000}, "model.device_bytes: 1000 bytes are too few"),
    ):
        with pytest.raises(ModelError, match=says):
            load(path=path, **given)
    monkeypatch.setenv(ROOTS_VARIABLE, path)
    with pytest.raises(ModelError, match="is not allowed here"):
        load(path=path, transformer=same)
    monkeypatch.setattr(options, "find_spec", lambda package: None)
    for given, package in (({"transformer": str(tmp_path / "no.gguf")}, "gguf"), ({"storage": "int8"}, "torchao")):
        with pytest.raises(ModelError, match=rf"needs the package {package}.* pip install 'edit_ray\[quant\]'"):
            load(path=path, **given)


BLOCKS = {"offload": "blocks", "device_bytes": 1_000_000}


@pytest.mark.parametrize(
    ("model", "engine", "says"),
    [
        ({"offload": "blocks"}, {}, "model.offload is 'blocks', and model.device_bytes is not given"),
        (
            {"device_bytes": 1},
            {},
            "model.offload is 'text_encoder' and model.device_bytes 1; that must go with 'blocks'",
        ),
        (BLOCKS, {"cfg_parallel": True}, "engine.cfg_parallel is true and model.offload 'blocks'"),
        (BLOCKS, {"mode": "fast", "fp8": True}, "engine.fp8 is true and model.offload 'blocks'"),
        (BLOCKS | {"storage": "int8"}, {}, "model.storage is 'int8' and model.offload 'blocks'"),
        ({"storage": "int8", "transformer": "/x.safetensors"}, {}, "model.storage is 'int8' and model.transformer"),
        ({"storage": "fp8", "transformer": "/x.gguf"}, {}, "model.storage is 'fp8' and model.transformer GGUF"),
        ({"storage": "fp8"}, {"mode": "fast"}, "engine.mode is fast and model.storage 'fp8'"),
        ({"transformer": "/x.gguf"}, {"mode": "fast"}, "engine.mode is fast and model.transformer '/x.gguf'"),
        ({"transformer": "/x.safetensors"}, {}, "model.transformer is '/x.safetensors', which is not a file."),
        ({"transformer": "/x.bin"}, {}, "it must be the path of a file of weights"),
    ],
)
def test_what_excludes_each_other_is_one_sentence(model, engine, says):
    with pytest.raises(ConfigError) as error:
        config_of({"model": model, "engine": engine, "video": {"num_segments": 1}, "prompt_segments": PROMPTS})
    assert any(says in problem for problem in error.value.problems), error.value.problems


def test_the_names_are_wans(whole, folder):
    """What diffusers converts these names to is what it was made of."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["num_layers"] == 4
    assert "blocks.0.self_attn.q.weight" in weights(whole)
    assert isinstance(whole, EditWanPipeline)
