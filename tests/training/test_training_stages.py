"""Each stage of the training runs a few steps on a CPU, saves its state and goes on from it."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from edit_ray import EditWanPipeline
from tests.calls import load
from training.criteria import Size
from training.evaluate_world import BARS, judge_drift, judge_joins, judge_storyboard, sampled
from training.latent_clips import CaptionEncoder, LatentClips, shifted
from training.loop import Call, Loop
from training.models import CAPTION_TOKENS, build_text_encoder, build_tokenizer, build_transformer
from training.recipe import FULL, SMOKE
from training.sampling import sample_latents
from training.train_transformer import flow_loss, train_transformer
from training.train_vae import train_vae
from training.world_judge import load_judge, train_judge

RECIPE = replace(
    SMOKE, clips=(4, 4, 4), encode_batch=1, measured_batches=1, curriculum=((1.0, ((1, 1),)),), save_every_s=0.0
)


class Interrupted(Exception):
    """Stands for a kill after a few steps."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the stages made, with next to no training."""
    folder = tmp_path_factory.mktemp("tiny")
    for train in (train_vae, train_judge, train_transformer):
        train(Call(folder / "model", folder / "state", RECIPE, 1e-4))
    return folder


def test_the_transformer_trains_on_renewed_clips_until_a_time_of_day(model: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, renew_every=1)
    shutil.copytree(model / "model" / "vae", tmp_path / "vae")
    loop = train_transformer(Call(tmp_path, tmp_path / "state", recipe, 60, end=time.time() + 15))
    assert loop.step >= 1
    assert loop.seconds >= loop.budget_s
    assert all(torch.isfinite(average).all() for average in loop.averaged)


def test_captions_of_other_scenes_stand_for_some_with_half_of_their_words(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(RECIPE, tokenizer).requires_grad_(False)
    recipe = replace(RECIPE, unknown_captions=0.0, unknown_words=0.0, foreign_captions=0.25)
    texts = ["a red circle bouncing on a black background", "a shiny blue cube rolling on grass at noon"]
    own, foreign = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt").input_ids
    seen: list[torch.Tensor] = []

    def look(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0])

    encoder.register_forward_pre_hook(look)
    torch.manual_seed(0)
    CaptionEncoder(encoder, tokenizer, recipe)(own.repeat(400, 1), 0.5, foreign.repeat(400, 1))
    (ids,) = seen
    words = (foreign != tokenizer.pad_token_id) & (foreign != tokenizer.eos_token_id)
    empty, as_own = ids[:, 0] == tokenizer.eos_token_id, (ids == own).all(1)
    others = ids[~empty & ~as_own]
    assert 60 < len(others) < 140
    assert 160 < empty.sum() < 240
    assert torch.equal(others[:, ~words], foreign[~words].repeat(len(others), 1))
    unknown = others[:, words] == tokenizer.unk_token_id
    assert 0.4 < unknown.float().mean() < 0.6
    assert torch.equal(others[:, words][~unknown], foreign[words].repeat(len(others), 1)[~unknown])


def test_loop_resumes_where_it_was_saved(tmp_path: Path) -> None:
    def new_loop(minutes: float) -> tuple[torch.nn.Linear, Loop]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        return layer, Loop("layer", {"layer": layer}, Call(tmp_path, tmp_path, RECIPE, minutes), 1e-2)

    layer, loop = new_loop(minutes=10)

    def loss(step: int, progress: float) -> torch.Tensor:
        if step == 3:
            raise Interrupted
        return layer(torch.ones(1, 2)).square().sum()

    with pytest.raises(Interrupted):
        loop.run(loss)
    weights = layer.weight.detach().clone()
    again, resumed = new_loop(minutes=1e-9)
    assert resumed.step == 3
    assert torch.equal(again.weight, weights)
    assert resumed.optimizer.state_dict()["state"][0]["step"] == 3
    resumed.run(loss)  # the budget is spent, so it only leaves the averaged weights
    assert torch.equal(again.weight, resumed.averaged[0])
    assert not torch.equal(again.weight, weights)


def test_stages_train_and_go_on(model: Path) -> None:
    for name in ("vae", "judge", "transformer"):
        content = torch.load(model / "state" / f"{name}.pt", weights_only=True)
        assert content["step"] >= 1
        assert all(torch.isfinite(weight).all() for weight in content["averaged"])
    before = torch.load(model / "state" / "vae.pt", weights_only=True)
    train_vae(Call(model / "again", model / "state", RECIPE, (before["seconds"] + 0.5) / 60))
    assert torch.load(model / "state" / "vae.pt", weights_only=True)["step"] > before["step"]


def test_a_compact_state_begins_with_the_averaged_weights(tmp_path: Path) -> None:
    call, learning_rate = Call(tmp_path, tmp_path, RECIPE, minutes=10), 1e-2

    def interrupted_after(loop: Loop, layer: torch.nn.Linear, steps: int) -> list[float]:
        """The learning rate at the beginning of each step."""
        rates: list[float] = []

        def loss(step: int, progress: float) -> torch.Tensor:
            rates.append(loop.rate.item())  # of the step before
            if len(rates) > steps:
                raise Interrupted
            return layer(torch.ones(1, 2)).square().sum()

        with pytest.raises(Interrupted):
            loop.run(loss)
        return rates

    layer = torch.nn.Linear(2, 1)
    loop = Loop("layer", {"layer": layer}, call, learning_rate)
    interrupted_after(loop, layer, RECIPE.warmup_steps)
    assert loop.rate > 0.9 * learning_rate
    whole, beside = ((tmp_path / name).stat().st_size for name in ("layer.pt", "layer.compact.pt"))
    loop.compact()
    assert max(beside, (tmp_path / "layer.pt").stat().st_size) < whole
    again = torch.nn.Linear(2, 1)
    resumed = Loop("layer", {"layer": again}, call, learning_rate)
    assert resumed.step == loop.step
    torch.testing.assert_close(again.weight, loop.averaged[0], rtol=1e-3, atol=1e-6)
    rates = interrupted_after(resumed, again, steps=2)
    assert 0 < rates[1] < 0.02 * learning_rate, "new moments are warmed up"


def test_a_decoder_alone_keeps_the_latents(model: Path) -> None:
    spent = torch.load(model / "state" / "vae.pt", weights_only=True)["seconds"]
    before = AutoencoderKLWan.from_pretrained(model / "model" / "vae", dtype=torch.float32)
    shutil.copytree(model / "model" / "vae", model / "sharper" / "vae")
    train_vae(Call(model / "sharper", model / "state", RECIPE, (spent + 0.5) / 60), decoder_only=True)
    after = AutoencoderKLWan.from_pretrained(model / "sharper" / "vae", dtype=torch.float32)
    assert after.config.latents_std == before.config.latents_std
    assert not torch.equal(after.decoder.conv_out.weight, before.decoder.conv_out.weight)


def test_every_turn_of_the_recipe_trains() -> None:
    recipe = replace(FULL, layers=1, heads=1, ffn_dim=32, batch=8)
    tokenizer = build_tokenizer()
    ids = torch.full((4, CAPTION_TOKENS), tokenizer.eos_token_id)
    change = torch.full((4,), max(recipe.history_lengths) + 1)
    sizes = ((2, 2), (2, 2), (2, 4))
    latents = (torch.randn(4, recipe.clip_latents, recipe.vae_z_dim, *size) for size in sizes)
    clips = tuple(LatentClips(of_size, ids, ids, change) for of_size in latents)
    loss = flow_loss(clips, build_transformer(recipe), build_text_encoder(recipe, tokenizer), tokenizer, recipe)
    for step, turn in enumerate(recipe.turns):
        assert torch.isfinite(loss(step, 0.5)), turn


def test_stock_pipeline_loads_it_and_it_names_no_place(model: Path) -> None:
    pipe = WanPipeline.from_pretrained(model / "model")
    assert {pipe.vae.dtype, pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert (pipe.config.expand_timesteps, pipe.scheduler.config.flow_shift) == (True, 3.0)
    files = [path for path in (model / "model").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any(str(model) in path.read_text() for path in files if path.suffix == ".json")


def test_matrices_are_stored_in_eight_bits_and_load_as_they_were(model: Path) -> None:
    stored = load_file(model / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.ffn.net.2.weight"].dtype == torch.float8_e4m3fn
    assert stored["blocks.0.norm2.weight"].dtype == torch.float16
    transformer = WanTransformer3DModel.from_pretrained(model / "model" / "transformer")
    averaged = torch.load(model / "state" / "transformer.pt", weights_only=True)["averaged"]
    for loaded, trained in zip(transformer.parameters(), averaged, strict=False):  # then those of the text encoder
        assert (loaded - trained).norm() <= 0.05 * trained.norm() + 1e-3


@pytest.fixture
def pipe(model: Path) -> EditWanPipeline:
    return load(model / "model", torch_dtype=torch.float32)


def test_the_small_world_is_evaluated(model: Path, pipe: EditWanPipeline) -> None:
    size = Size(samples=1, continuations=1, chains=1, segments=2, batch=1, world_size=(16, 32), world_steps=1)
    judge = load_judge(model / "state", RECIPE, "cpu")
    one = sampled(pipe, judge, size, negative="blurry")
    assert set(BARS) < set(one.right)
    joins, drift, story = judge_joins(pipe, size, one), judge_drift(pipe, size), judge_storyboard(pipe, judge, size)
    assert all(result.figure >= 0 for result in (*joins, *drift, *story))


def test_samples_and_continuations(pipe: EditWanPipeline) -> None:
    prompts = ["a red circle bouncing on a black background"]
    latents = sample_latents(pipe, prompts, [1], num_inference_steps=2)
    assert latents.shape == (1, FULL.vae_z_dim, 9, 16, 16)
    following = sample_latents(pipe, prompts, [2], latents[:, :, -3:], num_inference_steps=2)
    assert torch.equal(following[:, :, :3], latents[:, :, -3:])
    assert torch.isfinite(following).all()


def test_autoencoder_samples_its_mode_and_is_normalised(model: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(model / "model" / "vae", dtype=torch.float32)
    assert len(vae.config.latents_mean) == FULL.vae_z_dim
    assert all(std > 0 for std in vae.config.latents_std)
    distribution = vae.encode(torch.rand(1, 3, 5, 16, 16)).latent_dist
    torch.testing.assert_close(distribution.sample(), distribution.mode(), rtol=0, atol=1e-3)


def test_shift_keeps_the_ends_and_raises_the_middle() -> None:
    torch.testing.assert_close(shifted(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))
