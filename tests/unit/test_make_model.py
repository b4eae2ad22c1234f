"""Models with a published Wan's configuration and random weights: sizes, files, and that they load and run."""

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from edit_ray import EditCausalWanPipeline, EditWanPipeline
from edit_ray.cli.main import main, parser
from edit_ray.engine.model_info import read_model_info
from edit_ray.engine.segment import SegmentEngine
from edit_ray.errors import ModelError
from edit_ray.testing import VARIANTS, Variant, fill_random, make_model, meta_transformer
from edit_ray.testing.made_model import save_random_weights
from tests.calls import load, quiet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
PUBLISHED = {
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "t2v-A14B": 14_288_491_584,
    "i2v-14B": 16_394_878_784,
    "i2v-A14B": 14_288_901_184,
    "ti2v-5B": 4_999_787_712,
    "vace-1.3B": 2_153_972_032,
    "vace-14B": 17_337_592_896,
}
PUBLISHED |= {"causal-1.3B": PUBLISHED["t2v-1.3B"], "causal-14B": PUBLISHED["t2v-14B"]}
SMALL = Variant(
    {
        **{"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 2},
        **{"text_dim": 32, "freq_dim": 32, "rope_max_seq_len": 64},
    },
    flow_shift=3.0,
    vae={"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    text_encoder={"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
)
# Each kind at a small size: what differs from text to video, and the arguments of a call.
PICTURE = Image.new("RGB", (32, 32), "red")
IN_36 = {"in_channels": 36, "out_channels": 16}
CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP |= {"image_size": 32, "patch_size": 16}
KINDS = {
    "text": ({}, {}, {}),
    "two experts": ({}, {"boundary_ratio": 0.5}, {}),
    "image": (IN_36, {"boundary_ratio": 0.5}, {"image": PICTURE}),
    "CLIP": (IN_36 | {"image_dim": 16, "added_kv_proj_dim": 24}, {"image_encoder": CLIP}, {"image": PICTURE}),
    "VACE": ({"vace_layers": [0]}, {}, {"reference_images": [PICTURE]}),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_the_published_sizes(name):
    assert count(meta_transformer(name)) == PUBLISHED[name]
    with torch.device("meta"):
        vae = AutoencoderKLWan(**VARIANTS[name].vae)
    assert round(count(vae) / 1e6) == (705 if name == "ti2v-5B" else 127)


def test_the_full_text_encoder_is_umt5_xxl():
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**VARIANTS["t2v-1.3B"].text_encoder_config("full")))
    assert count(encoder) == 5_680_910_336


@pytest.mark.parametrize("text_encoder", ["full", "none"])
def test_a_made_model_loads_and_runs_in_bfloat16(tmp_path, text_encoder):
    make_model(tmp_path, SMALL, text_encoder=text_encoder, file_bytes=32_000)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    pipe = load(tmp_path, torch_dtype=torch.bfloat16)
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    if text_encoder == "none":
        with pytest.raises(ModelError, match="no text encoder"):
            SegmentEngine(pipe).encode_prompts(["any text"])
        embeds = {name: torch.randn(1, 512, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
        video = pipe(**call, **embeds)[0]
    else:
        video = pipe("any text, naïve 世界", **call)[0]
        assert read_model_info(str(tmp_path)).vocabulary is None
    assert 0.01 < video.std() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_diffusers_loads(tmp_path, kind):
    transformer, more, given = KINDS[kind]
    make_model(tmp_path, replace(SMALL, transformer=SMALL.transformer | transformer, **more))
    found = []
    for loader in (diffusers.DiffusionPipeline, EditWanPipeline):
        pipe = quiet(loader.from_pretrained(tmp_path))
        call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"} | given
        found.append(pipe(prompt="any", **call, generator=torch.manual_seed(0)).frames)
    assert torch.equal(*found)


def written(folder, **changes):
    cpu = {"dtype": torch.float32, "device": torch.device("cpu")}
    save_random_weights(meta_transformer(SMALL), folder / "w", **cpu, **changes)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
        file.unlink()
    return found


def test_weights_depend_on_seed_and_name_and_not_on_files(tmp_path):
    one, many = written(tmp_path, seed=0), written(tmp_path, seed=0, file_bytes=20_000)
    other = written(tmp_path, seed=1)
    assert one.keys() == many.keys() == meta_transformer(SMALL).state_dict().keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert not torch.equal(one["proj_out.weight"], other["proj_out.weight"])
    filled = WanTransformer3DModel(**SMALL.transformer)
    fill_random(filled)
    assert all(torch.equal(one[name], value) for name, value in filled.state_dict().items())


def test_the_command_knows_every_variant_and_keeps_what_is_there(tmp_path, capsys):
    assert set(VARIANTS) == set(PUBLISHED)
    for name in VARIANTS:
        assert parser().parse_args(["make-model", "--variant", name, "--output", "x"]).text_encoder == "full"
    (tmp_path / "file").touch()
    assert main(["make-model", "--variant", "t2v-1.3B", "--output", str(tmp_path)]) == 2
    assert "new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert main(["make-model", "--variant", "t2v-1.3B", "--output", str(tmp_path / ("x" * 300))]) == 2
    assert "cannot be written (File name too long)" in capsys.readouterr().err


def test_a_causal_variant_makes_a_causal_model(tmp_path):
    make_model(tmp_path, replace(SMALL, causal={"window": 6, "sink": 3}))
    pipe = EditCausalWanPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.causal.window, pipe.causal.sink, pipe.causal.chunk_size) == (6, 3, 3)
    assert pipe("any text", height=32, width=32, num_frames=9)[0].shape == (9, 32, 32, 3)
    assert read_model_info(str(tmp_path)).causal == pipe.causal
    with pytest.raises(ModelError, match="EditCausalWanPipeline loads it, and a run with continuity"):
        EditWanPipeline.from_pretrained(tmp_path)
