"""LoRA and few steps in a configuration: what is wrong is one sentence each, all at once, and no weights are read."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edit_ray.config import Config, config_of, dump_yaml, load_config
from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.options import ModelOptions
from edit_ray.errors import ConfigError
from edit_ray.testing import save_random_wan
from tests.loras import DIALECTS, save_lora

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with two experts, without its weights, and its transformer."""
    folder = save_random_wan(tmp_path_factory.mktemp("wan"), two_experts=True)
    transformer = load_pipeline(ModelOptions(path=str(folder), device="cpu")).transformer
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder, transformer


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """LoRA files by name: one in each dialect, and wrong ones."""
    folder, transformer = tmp_path_factory.mktemp("loras"), model[1]
    for dialect in DIALECTS:
        save_lora(folder / f"{dialect}.safetensors", transformer, dialect)
    good = load_file(folder / "diffusers.safetensors")
    key = "transformer.blocks.0.attn1.to_q.lora_A.weight"
    wide = copy.deepcopy(transformer)
    wide.blocks[0].attn1.to_q = torch.nn.Linear(48, 24)
    save_lora(folder / "wide.safetensors", wide)
    deep = copy.deepcopy(transformer)
    deep.blocks.append(copy.deepcopy(deep.blocks[0]))
    save_lora(folder / "deep.safetensors", deep, "wan")
    save_file(good | {key: torch.zeros(2, 24)}, folder / "rank.safetensors")
    save_file({name: value for name, value in good.items() if name != key}, folder / "half.safetensors")
    save_file({"lora_te_text_model_q.lora_down.weight": torch.zeros(2, 4)}, folder / "text.safetensors")
    save_file({"diffusion_model.x.lora_A.weight": torch.zeros(2, 4)}, folder / "strange.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"no header")
    image = {f"transformer.blocks.0.attn2.add_k_proj.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}
    save_file(good | image, folder / "image.safetensors")
    return folder


def config(of, /, *loras, prompts=({"segment": 0, "prompt": "a red circle"},), sampling=None, **sections):
    given = {"path": str(of[0]), "loras": list(loras), **sections.pop("model", {})}
    return {
        "model": given,
        "sampling": {"num_frames": 9, **(sampling or {})},
        "video": {"num_segments": 3},
        "prompt_segments": list(prompts),
        **sections,
    }


def problems(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        config_of(config(*args, **kwargs))
    return caught.value.problems


@pytest.mark.parametrize("name", [*DIALECTS, "image"])
def test_a_lora_that_fits_is_found_so_by_its_header(model, files, name):
    lora = {"path": str(files / f"{name}.safetensors"), "expert": "transformer_2", "weight": 0.5}
    assert config_of(config(model, lora)).model.loras[0].weight == 0.5


WRONG_FILES = {
    "nowhere": "nowhere.safetensors' is not a file",
    "damaged": "damaged.safetensors' cannot be read as safetensors",
    "text": "matches nothing in the transformer; it holds lora_te_text_model_q.lora_down.weight.",
    "strange": "has no keys that diffusers converts (ValueError); it holds diffusion_model.x.lora_A.weight.",
    "wide": "is of another model: its blocks.0.attn1.to_q has 48 features in and 24 out, that of this transformer 24",
    "deep": "is of another model: this transformer has no blocks.2.attn1.to_k, blocks.2.attn1.to_out.0, blocks.2.attn1",
    "rank": "has the ranks 2 and 3 in the two matrices of blocks.0.attn1.to_q; they must be equal.",
    "half": "has no two matrices for blocks.0.attn1.to_q.",
}


def test_every_lora_that_does_not_fit_is_one_sentence(model, files):
    loras = [{"path": str(files / f"{name}.safetensors")} for name in WRONG_FILES]
    found = problems(model, *loras)
    assert len(found) == len(loras)
    for index, (problem, words) in enumerate(zip(found, WRONG_FILES.values(), strict=True)):
        assert problem.startswith(f"model.loras.{index}.path ")
        assert words in problem


def test_files_outside_of_the_operators_folders_are_refused(model, files, monkeypatch):
    monkeypatch.setenv("EDIT_RAY_MODEL_ROOTS", str(model[0]))
    (problem,) = problems(model, {"path": str(files / "wan.safetensors")})
    assert "is not allowed here" in problem


def test_without_peft_it_is_said(model, files, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems(model, {"path": str(files / "wan.safetensors")})
    assert "needs the library peft, of the extra edit_ray[lora]" in problem


GOOD = {"path": "wan.safetensors"}
OTHER = [{"segment": 0, "prompt": "a", "lora_weights": {"one": 0.5}}]
CASES = {
    "an expert that is none": ([GOOD | {"expert": "high"}], {}, ["model.loras.0.expert is 'high'; it must be one of"]),
    "two of one name": (
        [GOOD | {"adapter": "one"}, GOOD | {"adapter": "one", "expert": "transformer_2"}, GOOD | {"adapter": "one"}],
        {},
        ["model.loras.2.adapter is 'one', as another one of transformer is called"],
    ),
    "a name": ([GOOD | {"adapter": "a.b"}], {}, ["model.loras.0.adapter is 'a.b'; it must be 1 to 64 letters"]),
    "a weight": (
        [GOOD | {"weight": 11}],
        {},
        ["model.loras.0.weight is 11; it must be a finite number from -10 to 10"],
    ),
    "no file of weights": ([{"path": "a.pt"}], {}, ["model.loras.0.path is 'a.pt'; it must be the path of a .safeten"]),
    "fused": (
        [GOOD | {"adapter": "one"}],
        {"prompts": OTHER},
        ["prompt_segments.0.lora_weights is given, and model.fuse_lora is true; it must be false"],
    ),
    "no such adapter": (
        [GOOD],
        {"prompts": OTHER, "model": {"fuse_lora": False}},
        ["prompt_segments.0.lora_weights.one names no adapter; it must be one of lora_0."],
    ),
    "two GPUs": (
        [GOOD | {"adapter": "one"}],
        {"prompts": OTHER, "model": {"fuse_lora": False}, "engine": {"cfg_parallel": True}},
        ["prompt_segments.0.lora_weights is given, and engine.cfg_parallel is true; with it, weights must stay"],
    ),
    "reuse": (
        [GOOD | {"adapter": "one"}],
        {
            "prompts": OTHER,
            "model": {"fuse_lora": False},
            "cache": {"policy": "warmstart_reuse", "reuse_window": 1, "inner": "fbcache"},
        },
        ["prompt_segments.0.lora_weights is given, and cache.reuse_window is above 0"],
    ),
    "whole numbers": (
        [GOOD],
        {"model": {"storage": "int8"}},
        ["model.fuse_lora is true and model.storage 'int8'; such weights take no LoRA, it must be false."],
    ),
    "GGUF": (
        [GOOD],
        {"model": {"transformer": "high.gguf"}},
        ["model.fuse_lora is true and model.transformer '"],
    ),
    "steps and sigmas": (
        [],
        {"sampling": {"sigmas": [1.0, 0.5], "num_inference_steps": 4}},
        ["sampling.num_inference_steps is 4, and sampling.sigmas has 2 noise levels; one of them must be given"],
    ),
    "a sampler without noise levels": (
        [],
        {"sampling": {"sigmas": [1.0, 0.5], "sampler": "dpm++"}},
        ["sampling.sampler is 'dpm++', which takes no noise levels"],
    ),
    "a sampler": (
        [],
        {"sampling": {"sampler": "ddim"}},
        ["sampler is 'ddim'; it must be one of unipc, euler, dpm++, re"],
    ),
    "guidance below alone": (
        [],
        {"sampling": {"guidance_scale": 1.0, "guidance_scale_2": 3.0}},
        ["sampling.guidance_scale_2 is 3 and sampling.guidance_scale 1; guidance is on where both are above 1"],
    ),
    "a boundary": (
        [],
        {"sampling": {"boundary_ratio": 1}},
        ["boundary_ratio is 1; it must be a finite number above 0"],
    ),
    "all at once": (
        [GOOD | {"expert": "low"}, GOOD | {"weight": "much"}],
        {"sampling": {"sigmas": [0.5, 0.75], "boundary_ratio": 0}},
        ["loras.0.expert is 'low'", "loras.1.weight is 'much'", "sigmas is a list of 2", "boundary_ratio is 0"],
    ),
}


@pytest.mark.parametrize(("loras", "sections", "words"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_one_sentence(model, files, monkeypatch, loras, sections, words):
    monkeypatch.chdir(files)
    found = problems(model, *loras, **sections)
    assert len(found) == len(words)
    assert [said for said in words if said not in "\n".join(found)] == []


@pytest.mark.parametrize("sigmas", [[], [1.1, 0.5], [0.5, 0.5], [0.5, 0.0], [0.2, 0.8], [True], ["1"], 0.5], ids=str)
def test_noise_levels_fall_from_at_most_1_to_above_0(model, sigmas):
    (problem, *_) = problems(model, sampling={"sigmas": sigmas})
    assert problem.startswith("sampling.sigmas")
    assert "falling numbers, from at most 1 to above 0" in problem or "sampling.sigmas.0" in problem


def test_an_expert_that_the_model_lacks(tmp_path_factory, files):
    folder = save_random_wan(tmp_path_factory.mktemp("one"))
    second = {"path": str(files / "wan.safetensors"), "expert": "transformer_2"}
    found = problems((folder,), second, sampling={"guidance_scale_2": 3.0, "boundary_ratio": 0.9})
    assert [said.split(";")[0] for said in found] == [
        "sampling.guidance_scale_2 is 3",
        "sampling.boundary_ratio is 0.9",
        "model.loras.0.expert is 'transformer_2'",
    ]


def test_noise_levels_count_the_steps_and_survive_writing(model, files, tmp_path):
    loras = [{"path": str(files / "wan.safetensors"), "expert": name} for name in ("transformer", "transformer_2")]
    sampling = {"sigmas": [1, 0.75], "sampler": "renoise", "guidance_scale_2": 1.0, "boundary_ratio": 0.9}
    made = config_of(config(model, *loras, sampling=sampling, model={"fuse_lora": False}))
    assert (made.sampling.num_inference_steps, made.sampling.sigmas) == (2, (1.0, 0.75))
    assert Config.model_validate(json.loads(json.dumps(made.model_dump(mode="json")))) == made
    for empty in (False, True):
        (tmp_path / "run.yaml").write_text(dump_yaml(made, empty=empty))
        assert load_config(Path(tmp_path / "run.yaml")) == made
