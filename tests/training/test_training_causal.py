"""The causal stage: its forward is that of a stream, and it trains, continues, and is evaluated."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from edit_ray import EditCausalWanPipeline, EditWanPipeline
from edit_ray.cache.kv_retention import WindowSink, WindowState
from edit_ray.engine.causal_options import CausalOptions
from edit_ray.testing import save_random_wan
from tests.calls import load
from training.causal_forward import ChunkedTransformer, ChunkWindow
from training.criteria import Size
from training.evaluate_causal import BARS, FLAT_BARS, evaluate_causal
from training.latent_clips import CaptionEncoder, LatentClips
from training.loop import Call
from training.models import (
    CAPTION_TOKENS,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    save_pipeline,
)
from training.recipe import FULL, SMOKE
from training.sampling import load_causal, stream_latents
from training.train_causal import ConsistencyLoss, ForcingLoss, consistency_levels, draw_batch, train_causal
from training.world_judge import load_judge, train_judge

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = replace(SMOKE, encode_batch=1)
PROMPTS = ["a red circle", "a blue square"]
CHUNKS = 6
LATER = 20  # what the ids of a later scene have more


# Its forward


def chunk_forwards(folder: Path) -> tuple[WanTransformer3DModel, Tensor, list[list[tuple[dict, Tensor]]]]:
    """The transformer, the clean latents of a stream, and the arguments and result of each step's forwards."""
    pipe = EditCausalWanPipeline.from_pretrained(folder)
    forwards = []

    def seen(module, arguments, keywords, result):
        forwards.append((keywords, result[0]))

    hook = pipe.transformer.register_forward_hook(seen, with_kwargs=True)
    size = {"height": 32, "width": 48, "max_sequence_length": 32, "decode": False}
    stream = pipe.stream(PROMPTS, generator=torch.Generator().manual_seed(0), **size)
    clean = torch.cat([next(stream).latents for _ in range(CHUNKS)], dim=2)
    hook.remove()
    return pipe.transformer, clean, [forwards[step::5] for step in range(4)]  # the fifth is of the clean chunk


@pytest.mark.parametrize(("window", "sink"), [(9, 3), (9, 0), (12, 6), (6, 3), (3, 0), (21, 3)])
@torch.no_grad()
def test_one_pass_makes_every_forward_of_a_stream(tmp_path: Path, window: int, sink: int) -> None:
    folder = save_random_wan(tmp_path, num_layers=3, causal={"window": window, "sink": sink})
    transformer, clean, steps = chunk_forwards(folder)
    chunked = ChunkedTransformer(transformer, chunk_size=3)
    for forwards in steps:
        noisy, text = torch.cat([keywords["hidden_states"] for keywords, _ in forwards], dim=2), forwards[0][0]
        sigma = torch.stack([keywords["timestep"] for keywords, _ in forwards], dim=1) / 1000
        expected = torch.cat([result for _, result in forwards], dim=2)
        given_to_all = noisy, sigma, text["encoder_hidden_states"]
        of_window = chunked(clean, *given_to_all, ChunkWindow(window // 3, sink // 3))
        assert (of_window - expected).abs().max() <= 1e-5
        other = chunked(clean, *given_to_all, ChunkWindow(window // 3 + (2 if window < 18 else -4), sink // 3))
        assert (other - expected).abs().max() > 1e-3, "another window is another forward"


WINDOWS = st.integers(0, 3).flatmap(lambda sink: st.builds(ChunkWindow, st.integers(sink + 1, 8), st.just(sink)))


@given(window=WINDOWS, chunks=st.integers(1, 12))
def test_a_window_holds_what_the_engine_keeps(window: ChunkWindow, chunks: int) -> None:
    held: tuple[int, ...] = ()
    for chunk in range(chunks):
        held = tuple(WindowSink().select(WindowState(chunk, held, (), window.length - 1, window.sink)))
        assert window.before(chunk) == list(held)
        held = (*held, chunk)


@given(window=WINDOWS, chunks=st.integers(1, 12))
def test_chunks_of_a_span_see_equally_many_and_none_is_left_out(window: ChunkWindow, chunks: int) -> None:
    spans = window.spans(chunks)
    assert [chunk for first, end in spans for chunk in range(first, end)] == list(range(chunks))
    for first, end in spans:
        assert {len(window.before(chunk)) for chunk in range(first, end)} == {len(window.before(first))}


# Its losses


def clips_of(recipe, sizes=((2, 2), (2, 2), (2, 4))) -> tuple[LatentClips, ...]:
    ids = torch.arange(8)[:, None].expand(-1, CAPTION_TOKENS)
    change = torch.full((8,), 2 * recipe.chunk_size)
    latents = (torch.randn(8, recipe.causal_clip_latents, recipe.vae_z_dim, *size) for size in sizes)
    return tuple(LatentClips(of_size, ids, ids + LATER, change) for of_size in latents)


def losses_of(recipe) -> tuple[ForcingLoss, ConsistencyLoss, list[WanTransformer3DModel]]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    captions = CaptionEncoder(build_text_encoder(recipe, tokenizer).requires_grad_(False), tokenizer, recipe)
    student = build_transformer(recipe)
    models = [student, *(copy.deepcopy(student).requires_grad_(False) for _ in range(2))]
    clips, chunked = clips_of(recipe), [ChunkedTransformer(model, recipe.chunk_size) for model in models]
    consistency = ConsistencyLoss(clips, *chunked, captions, recipe, consistency_levels(recipe))
    return ForcingLoss(clips, chunked[0], captions, recipe), consistency, models


def test_every_turn_of_the_recipe_trains() -> None:
    recipe = replace(FULL, layers=1, heads=1, ffn_dim=32, causal_batch=2)
    forcing, consistency, _ = losses_of(recipe)
    for step, turn in enumerate(recipe.causal_turns):
        assert torch.isfinite(forcing(step, 0.1)), turn
        assert torch.isfinite(consistency(step, 0.9)), turn


def test_the_student_alone_learns_from_consistency_and_a_seed_is_a_loss() -> None:
    _, consistency, (student, average, teacher) = losses_of(SMOKE)
    first = consistency(0, 0.5)
    first.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not any(parameter.grad is not None for model in (average, teacher) for parameter in model.parameters())
    assert torch.equal(losses_of(SMOKE)[1](0, 0.5), first)


def test_nothing_in_a_step_waits_for_a_value() -> None:
    forcing, consistency, _ = losses_of(SMOKE)
    with FakeTensorMode(allow_non_fake_inputs=True):  # its tensors have no values: reading one is an error
        for loss in (forcing, consistency):
            value = loss(0, 0.5)
            value.backward()
            with pytest.raises(DataDependentOutputException):
                value.item()


def test_at_the_lowest_level_the_target_is_where_the_teacher_arrives() -> None:
    recipe = replace(SMOKE, causal_guidance=1.0, history_noise=0.0, history_tint=0.0, recycled=0.0)
    lowest = consistency_levels(recipe)[-2:]
    _, consistency, _ = losses_of(recipe)
    # One level above 0, and a student that is the teacher: both take the same step, and there is nothing to learn.
    assert replace(consistency, levels=lowest)(0, 0.5) < 1e-12
    assert consistency(0, 0.5) > 1e-6


def test_the_sampler_steps_are_levels() -> None:
    levels = consistency_levels(FULL)
    assert (levels[0], levels[-1]) == (1, 0)
    assert (levels.diff() < 0).all()
    for sigma in CausalOptions().sigmas:
        assert (levels - sigma).abs().min() < 1e-6


def test_of_a_clip_that_changes_the_later_scene_counts_with_its_caption() -> None:
    recipe = replace(FULL, causal_batch=64, causal_changes=0.5)
    torch.manual_seed(0)
    batch = draw_batch(clips_of(recipe), recipe, 0)
    changes = batch.ids[:, 0] >= LATER
    assert 16 < changes.sum() < 48
    before = 2 * recipe.chunk_size
    assert (batch.weight[changes, :before] == 0).all()
    assert (batch.weight[:, before:] == 1).all()
    assert (batch.weight[~changes, 0] == recipe.first_frame_weight).all()
    error = torch.zeros_like(batch.x0)
    error[changes, :, :before] = 1.0
    assert batch.mean(error) == 0
    assert batch.mean(torch.ones_like(error)) == pytest.approx(1)


# The stage


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bidirectional model that has learned nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    parts = build_vae(RECIPE), build_transformer(RECIPE), build_text_encoder(RECIPE, build_tokenizer())
    save_pipeline(folder, *parts, RECIPE)
    return folder


def output_of(untrained: Path, folder: Path) -> Path:
    """A folder with that model's parts, to train in."""
    folder.mkdir(parents=True)
    for part in untrained.iterdir():
        (folder / part.name).symlink_to(part)
    return folder


@pytest.fixture(scope="module")
def trained(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model and the state after a step or so of each loop."""
    folder = tmp_path_factory.mktemp("causal")
    loop = train_causal(Call(output_of(untrained, folder / "model"), folder / "state", RECIPE, 1e-4))
    assert (loop.name, loop.step) == ("causal", 1)
    return folder


def test_it_is_a_causal_model_beside_the_parts_of_the_other(trained: Path) -> None:
    assert {path.name for path in (trained / "model" / "causal").iterdir()} == {"model_index.json", "transformer"}
    pipe = load_causal(trained / "model" / "causal", load(trained / "model", torch_dtype=torch.float32))
    assert (pipe.causal.chunk_size, pipe.causal.window, pipe.causal.sink) == (3, 12, 3)
    latents = stream_latents(pipe, PROMPTS, [1, 2], 3, (16, 32), switch=(1, PROMPTS[::-1]))
    assert latents.shape == (2, RECIPE.vae_z_dim, 9, 2, 4)
    assert torch.isfinite(latents).all()
    assert not any(str(trained) in path.read_text() for path in trained.rglob("causal/**/*.json"))


def test_the_average_that_makes_the_targets_is_what_is_saved(trained: Path) -> None:
    averaged = torch.load(trained / "state" / "causal.pt", weights_only=True)["averaged"]
    teacher = torch.load(trained / "state" / "causal_teacher.pt", weights_only=True)
    assert set(teacher) == {"averaged", "step", "seconds"}, "all that is needed of it"
    saved = WanTransformer3DModel.from_pretrained(trained / "model" / "causal" / "transformer")
    moved = False
    for loaded, weight, begun in zip(saved.parameters(), averaged, teacher["averaged"], strict=True):
        assert (loaded - weight).norm() <= 0.05 * weight.norm() + 1e-3
        moved |= not torch.equal(weight, begun.float())
    assert moved


def test_a_call_continues_the_loop_that_has_time_left(untrained: Path, tmp_path: Path) -> None:
    call = Call(output_of(untrained, tmp_path / "model"), tmp_path / "state", RECIPE, 10, slice_minutes=1e-3)
    forcing = train_causal(call)
    assert forcing.name == "causal_teacher"
    assert forcing.step >= 1
    assert not (tmp_path / "model" / "causal").exists()
    forcing.compact()
    spent = replace(call, minutes=2 * forcing.seconds / 60, slice_minutes=1e-3)
    distilling = train_causal(spent)
    assert distilling.name == "causal"
    assert distilling.step >= 1
    again = torch.load(tmp_path / "state" / "causal_teacher.pt", weights_only=True)
    assert again["step"] == forcing.step


def test_the_causal_model_is_evaluated(trained: Path) -> None:
    train_judge(Call(trained / "model", trained / "state", RECIPE, 1e-5))
    bidirectional = load(trained / "model", torch_dtype=torch.float32)
    pipe = load_causal(trained / "model" / "causal", bidirectional)
    sizes = {"samples": 1, "continuations": 1, "chains": 1, "batch": 1, "world_size": (16, 32), "world_steps": 1}
    size = Size(**sizes, stream_chunks=4)
    judge = load_judge(trained / "state", RECIPE, "cpu")
    results = list(evaluate_causal(pipe, bidirectional, size, judge))
    names = [result.name for result in results]
    assert len(set(names)) == len(names) == 2 * len(FLAT_BARS) + 2 + 2 * len(FLAT_BARS) + 2 + 2 * len(BARS) + 2
    assert all(result.bar is None for result in results if result.name.startswith("history"))
    assert all(str(result) for result in results)
    assert isinstance(bidirectional, EditWanPipeline)
