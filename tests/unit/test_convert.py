"""Published causal checkpoints become folders that load: every form of names, and what is no checkpoint is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from edit_ray import EditCausalWanPipeline
from edit_ray.cli.main import main
from edit_ray.engine.checkpoint_process import weights_in
from edit_ray.testing import save_random_wan

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGINAL = {  # parts of diffusers' names, and of the original ones
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", ".norm2.": ".norm3.", "proj_out": "head.head",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights of another model of the base's sizes, under diffusers' names."""
    folder = save_random_wan(tmp_path_factory.mktemp("other"), seed=7)
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def original(weights, prefix="model."):
    renamed = {}
    for name, weight in weights.items():
        new = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for ours, theirs in ORIGINAL.items():
            new = new.replace(ours, theirs)
        renamed[prefix + new] = weight
    return renamed


def as_pickle(weights, path):
    worse = {name: weight * 0 for name, weight in original(weights).items()}
    torch.save({"generator": worse, "generator_ema": original(weights), "step": 3}, path / "model.pt")
    return path / "model.pt"


def as_wrapped(weights, path):
    save_file(original(weights, "model._fsdp_wrapped_module."), path / "model.safetensors")
    return path / "model.safetensors"


def as_safetensors(weights, path):
    save_file(original(weights, ""), path / "model.safetensors")
    return path / "model.safetensors"


def as_fastvideo(weights, path):
    (path / "fast" / "transformer").mkdir(parents=True)
    (path / "fast" / "transformer" / "config.json").write_text('{"_class_name": "CausalWanTransformer3DModel"}')
    save_file(weights, path / "fast" / "transformer" / "diffusion_pytorch_model.safetensors")
    return path / "fast"


@pytest.mark.parametrize("form", [as_pickle, as_wrapped, as_safetensors, as_fastvideo])
def test_a_checkpoint_becomes_a_causal_model(base, weights, tmp_path, capsys, form):
    source, output = form(weights, tmp_path), tmp_path / "made"
    arguments = ["convert", str(source), "--base", str(base), "--output", str(output)]
    assert main([*arguments, "--window", "12", "--sink", "3", "--rope", "absolute"]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    pipe = EditCausalWanPipeline.from_pretrained(output)
    assert (pipe.causal.window, pipe.causal.sink, pipe.causal.rope) == (12, 3, "absolute")
    made = pipe.transformer.state_dict()
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weight) for name, weight in weights.items())
    assert next(pipe.stream("a red circle", height=32, width=32)).frames.shape == (9, 32, 32, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, "made"])


class Hostile:
    """What a pickle may run when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_runs_none(base, tmp_path, capsys):
    torch.save({"generator_ema": Hostile(tmp_path / "ran")}, tmp_path / "model.pt")
    assert main(["convert", str(tmp_path / "model.pt"), "--base", str(base), "--output", str(tmp_path / "made")]) == 2
    said = capsys.readouterr().err
    assert "cannot be read as a checkpoint: Weights only load failed" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def without_a_weight(weights):
    return {name: weight for name, weight in original(weights).items() if "blocks.1.ffn.0.bias" not in name}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (without_a_weight, "of 69 weights it lacks 1, such as blocks.1.ffn.net.0.proj.bias"),
        (lambda w: original(w) | {"model.blocks.2.more": torch.ones(1)}, "it has beyond them 1, such as blocks.2.more"),
        (
            lambda w: original(w) | {"model.head.head.bias": torch.ones(5)},
            "proj_out.bias is [5] there, and [16] in the",
        ),
    ],
)
def test_what_is_no_checkpoint_of_the_base_is_said(base, weights, tmp_path, capsys, made, said):
    source = tmp_path / "model.safetensors"
    save_file(made(weights), source)
    assert main(["convert", str(source), "--base", str(base), "--output", str(tmp_path / "made")]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("checkpoint", [3, {}, {"step": 3}, {"generator": {"step": 3}}])
def test_what_has_no_weights_is_said(checkpoint):
    with pytest.raises(ValueError, match="no mapping of weights, by itself or under generator_ema, generator"):
        weights_in(checkpoint)


def test_wrong_arguments_are_said(base, tmp_path, capsys):
    source = tmp_path / "model.pt"
    for arguments, said in (
        ([str(source), "--base", str(base), "--output", str(tmp_path / "made")], f"SOURCE is {source}, which does not"),
        ([str(base), "--base", str(base), "--output", str(tmp_path)], "which exists; it must be a new folder"),
        ([str(base), "--base", str(base), "--output", str(tmp_path / "a" / "b")], "cannot be written (No such file"),
        ([str(base), "--base", str(base), "--output", "x", "--window", "2"], "window is 2; it must be at least 3"),
    ):
        assert main(["convert", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_the_parts_of_the_base_are_its_files(base, weights, tmp_path):
    output = tmp_path / "made"
    assert main(["convert", str(as_safetensors(weights, tmp_path)), "--base", str(base), "--output", str(output)]) == 0
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "EditCausalWanPipeline"
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (base / part).iterdir():
            assert (output / part / file.name).read_bytes() == file.read_bytes()
    shutil.rmtree(output)
    assert (base / "vae" / "config.json").is_file()
