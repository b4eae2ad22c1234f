"""What a configuration must have in common with its model, read from real models' JSON files."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edit_ray.config import Config, check_config, load_config
from edit_ray.engine.known_words import words_of
from edit_ray.engine.model_info import dtype_problem, read_model_info
from edit_ray.errors import ConfigError
from edit_ray.testing import WORDS

ROOT = Path(__file__).resolve().parents[2]
Change = Callable[[Path], object]


@pytest.fixture
def model(model_without_weights: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(model_without_weights, tmp_path / "model"))


def edit(name: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | changes))

    return change


def write(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def load(model: Path | str, *overrides: str) -> Config:
    base = ["video.num_segments=2", "prompt_segments.0.segment=0", "prompt_segments.0.prompt=a red circle"]
    return load_config(None, [*base, f"model.path={model}", "sampling.num_frames=9", *overrides])


def problems_of(model: Path | str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(model, *overrides)
    return caught.value.problems


def test_a_model_s_files_say_what_it_is(model: Path) -> None:
    info = read_model_info(str(model))
    assert (info.height_step, info.width_step, info.scale_factor_temporal) == (16, 16, 4)
    assert info.z_dim == 4
    assert (info.expand_timesteps, info.boundary_ratio) == (True, None)
    assert info.vocabulary == set(WORDS)
    assert words_of(info.tokenizer, "A Red, circle") == ["a", "red", ",", "circle"]


def test_a_second_expert_alone_is_enough(model: Path) -> None:
    edit("model_index.json", transformer=[None, None], transformer_2=["diffusers", "WanTransformer3DModel"])(model)
    (model / "transformer").rename(model / "transformer_2")
    assert list(read_model_info(str(model)).num_blocks) == ["transformer_2"]


def test_steps_follow_from_patch_size_and_vae(model: Path) -> None:
    edit("transformer/config.json", patch_size=[1, 2, 4])(model)
    edit("vae/config.json", scale_factor_spatial=16)(model)
    info = read_model_info(str(model))
    assert (info.height_step, info.width_step) == (32, 64)


def test_a_model_whose_tokenizer_takes_any_text_knows_every_word(model: Path) -> None:
    edit("tokenizer/tokenizer.json", model={"type": "Unigram"})(model)
    assert read_model_info(str(model)).vocabulary is None
    load(model, "prompt_segments.0.prompt=a zebra")


HISTORY = ("continuity.mode=history", "continuity.history_latents=1")


def test_a_good_configuration_passes(model: Path) -> None:
    assert check_config(load(model, "prompt_segments.0.prompt=A RED circle", *HISTORY)) == []


FOR_THE_MODEL: list[tuple[list[str], tuple[str, ...]]] = [
    (["sampling.height=100"], ("sampling.height is 100", "a multiple of 16", "96 or 112")),
    (["sampling.width=24"], ("sampling.width is 24", "a multiple of 16", "16 or 32")),
    (
        ["prompt_segments.0.prompt=a purple zebra, a circle, a zebra"],
        ("prompt_segments.0.prompt", "'purple', 'zebra', ','", "it knows: a, and, background, black, blue"),
    ),
    (["sampling.negative_prompt=blurry"], ("sampling.negative_prompt", "'blurry'", "it knows: a, and")),
    (
        ["model.torch_dtype=float16", "model.device=cpu"],
        ("model.torch_dtype is 'float16'", "one of float32, bfloat16 on the device cpu"),
    ),
]


@pytest.mark.parametrize(("overrides", "words"), FOR_THE_MODEL, ids=lambda value: str(value)[:40])
def test_what_the_model_cannot_do_is_one_sentence(model: Path, overrides: Sequence[str], words: Sequence[str]) -> None:
    (problem,) = problems_of(model, *overrides)
    assert problem.startswith(f"--set {overrides[0]}")
    assert [word for word in words if word not in problem] == []


def test_history_needs_timesteps_per_token(model: Path) -> None:
    edit("model_index.json", expand_timesteps=False)(model)
    (problem,) = problems_of(model, *HISTORY)
    assert "continuity.mode is 'history'" in problem
    assert "expand_timesteps: true" in problem


def test_mistakes_about_the_model_come_with_all_others(model: Path) -> None:
    prompts = ("prompt_segments.0.prompt=a zebra", "prompt_segments.1.start=3", "prompt_segments.1.prompt=a yak")
    sampling = ("sampling.height=100", "sampling.num_frames=34", "sampling.sed=7")
    other = ("model.torch_dtype=float16", "model.device=tpu", "cache.policy=tea", "output.crf=99")
    problems = problems_of(model, *prompts, *sampling, *other)
    said = "\n".join(problems)
    for words in ("'zebra'", "'yak'", "height is 100", "num_frames is 34", "sed is an unknown", "device is 'tpu'"):
        assert words in said
    assert "cache.policy is 'tea'" in said
    assert "float16" not in said, "it may be right on the device that was meant"
    assert len(problems) == 9


# What is done to the folder, and words of the sentence.
DAMAGE: list[tuple[Change, tuple[str, ...]]] = [
    (remove("model_index.json"), ("has no model_index.json",)),
    (write("model_index.json", "{"), ("model_index.json that cannot be read as JSON",)),
    (write("model_index.json", "[]"), ("model_index.json that is not a JSON object",)),
    (write("model_index.json", "[" * 100_000), ("model_index.json that cannot be read as JSON",)),
    (write("model_index.json", "{}"), ("it must be a Wan model",)),
    (
        edit("model_index.json", _class_name="CogVideoXPipeline", transformer=["diffusers", "CogVideoX"]),
        ("a CogVideoXPipeline with the transformer CogVideoX", "must be a Wan model"),
    ),
    (
        edit("model_index.json", _class_name="StableDiffusionPipeline", transformer=[None, None]),
        ("a StableDiffusionPipeline with the transformer None", "must be a Wan model"),
    ),
    (edit("model_index.json", vae=["diffusers", "AutoencoderKL"]), ("the VAE AutoencoderKL;",)),
    (edit("model_index.json", boundary_ratio="high"), ("sizes that cannot be",)),
    (remove("transformer/config.json"), ("has no transformer/config.json",)),
    (edit("transformer/config.json", patch_size=[1, 2]), ("sizes that cannot be",)),
    (edit("transformer/config.json", patch_size=[1, 0, 2]), ("sizes that cannot be",)),
    (edit("transformer/config.json", in_channels=36), ("takes 36 channels", "or with a picture 12")),
    (remove("vae/config.json"), ("has no vae/config.json",)),
    (edit("vae/config.json", z_dim=None), ("sizes that cannot be",)),
    (edit("vae/config.json", scale_factor_temporal=8), ("one latent of 8 frames", "must be 4")),
    (edit("tokenizer/tokenizer.json", model={"type": "WordLevel"}), ("a damaged tokenizer/tokenizer.json",)),
]


@pytest.mark.parametrize(
    ("damage", "words"), DAMAGE, ids=lambda value: str(value[0])[:40] if type(value) is tuple else ""
)
def test_what_is_no_usable_wan_model_is_one_sentence(model: Path, damage: Change, words: tuple[str, ...]) -> None:
    damage(model)
    (problem,) = problems_of(model)
    assert problem.startswith(f"--set model.path={model}"[:99])
    assert [word for word in ("model.path", str(model), *words) if word not in problem] == []


def test_a_path_that_means_nothing_is_one_sentence() -> None:
    (problem,) = problems_of("no such thing", "cache.policy=fbcache")
    assert "model.path: 'no such thing' is neither a folder nor a hub id like org/name" in problem


@pytest.mark.parametrize(
    ("torch_dtype", "device", "runs"),
    [("float16", "cpu", False), ("bfloat16", "cpu", True), ("float16", "cuda", True), ("float16", "auto", True)],
)
def test_only_half_precision_on_the_cpu_is_refused(torch_dtype: str, device: str, runs: bool) -> None:
    assert (dtype_problem(torch_dtype, device) is None) is runs
