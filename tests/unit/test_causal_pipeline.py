"""A causal model as a library: calls, streams, prompts that change, caches, and what is refused."""

import copy
import json
import logging

import pytest
import torch

from edit_ray import EditCausalWanPipeline, EditWanPipeline
from edit_ray.cache import CPUOffloadStore
from edit_ray.cache.kv_retention import Similar
from edit_ray.engine import causal_stream
from edit_ray.engine.causal_options import CausalOptions, latents_of_chunks
from edit_ray.engine.fast_transformer import FastTransformer, Functions
from edit_ray.engine.precompute import Precompute
from edit_ray.errors import ConfigError, ModelError
from edit_ray.testing import save_random_wan

pytestmark = pytest.mark.usefixtures("one_thread")
CALL = {"prompt": "a red circle", "height": 32, "width": 48, "max_sequence_length": 32}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("causal"), num_layers=3, causal={"window": 9, "sink": 3})


@pytest.fixture
def pipe(folder):
    pipe = EditCausalWanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stream_of(pipe, seed=0, **changes):
    return pipe.stream(**(CALL | {"decode": False} | changes), generator=torch.Generator().manual_seed(seed))


def latents_of(stream, count):
    return torch.cat([next(stream).latents for _ in range(count)], dim=2)


def test_a_call_is_its_stream_decoded_as_it_goes(pipe):
    video = pipe(**CALL, num_frames=57, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    stream = stream_of(pipe, num_frames=57, decode=True)
    chunks = list(stream)
    frames = torch.cat([torch.from_numpy(chunk.frames) for chunk in chunks])
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12, 12]
    assert torch.equal(frames, video.permute(0, 2, 3, 1).mul(255).round().to(torch.uint8))
    assert [chunk.statistics.window for chunk in chunks] == [(0,), (0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4)]
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.kv.device_bytes == 0


def test_a_seed_makes_a_video_and_a_generator_moves_on(pipe):
    generator = torch.Generator().manual_seed(5)
    first, second = (pipe.stream(**CALL, decode=False, generator=generator) for _ in range(2))
    again = stream_of(pipe, seed=5)
    made = [latents_of(stream, 2) for stream in (first, second, again)]
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])
    two = pipe.stream(**CALL, decode=False, num_videos_per_prompt=2, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(latents_of(two, 2)[:1], made[0], atol=1e-4)


def test_streams_take_turns_and_each_makes_what_it_makes_alone(pipe):
    changes = [{"seed": 1}, {"seed": 2, "rope": "absolute", "sampler": "euler"}, {"seed": 3, "guidance_scale": 2.0}]
    alone = [latents_of(stream_of(pipe, **change), 4) for change in changes]
    streams = [stream_of(pipe, **change) for change in changes]
    turns = [[next(stream).latents for stream in streams] for _ in range(4)]
    for made, expected in zip(zip(*turns, strict=True), alone, strict=True):
        assert torch.equal(torch.cat(made, dim=2), expected)
    assert pipe.kv is streams[-1].kv


def test_kv_made_anew_for_the_same_prompt_changes_nothing(pipe):
    expected = latents_of(stream_of(pipe), 3)
    stream = stream_of(pipe)
    first = latents_of(stream, 2)
    stream.send(prompt=CALL["prompt"], switch="recache")
    assert torch.equal(torch.cat([first, latents_of(stream, 1)], dim=2), expected)


def test_a_given_beginning_is_continued_as_if_it_were_made_here(pipe):
    expected = latents_of(stream_of(pipe), 3)
    stream = stream_of(pipe, history=expected[:, :, :6], decode=True)
    chunk = next(stream)
    assert (chunk.index, chunk.frames.shape[0]) == (2, 12)
    assert torch.equal(chunk.latents, expected[:, :, 6:])


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_a_switch_keeps_makes_anew_or_drops_what_came_before(pipe, rope):
    made, windows = {}, {}
    for switch in ("keep", "recache", "cut"):
        stream = stream_of(pipe, rope=rope)
        latents_of(stream, 4)
        stream.send(prompt="a blue square", switch=switch)
        made[switch] = next(stream)
        windows[switch] = made[switch].statistics.window
    assert windows == {"keep": (0, 3, 4), "recache": (0, 3, 4), "cut": (4,)}
    a, b, c = (chunk.latents for chunk in made.values())
    assert not torch.equal(a, b)
    assert not torch.equal(b, c)


def test_a_cut_is_a_beginning(pipe):
    for rope in ("relative", "absolute"):
        stream, new = stream_of(pipe, rope=rope), stream_of(pipe, rope=rope, prompt="a blue square")
        latents_of(stream, 4)
        stream.send(prompt="a blue square", switch="cut")
        new.next_chunk = new._attention.origin = 4
        assert torch.equal(latents_of(stream, 3), latents_of(new, 3))


def test_a_given_beginning_keeps_its_prompt_when_another_is_sent_before_it_is_shown(pipe):
    history = latents_of(stream_of(pipe), 2)
    early, late = (stream_of(pipe, history=history) for _ in range(2))
    latents_of(late, 1)
    early.send(prompt="a blue square", switch="keep")
    latents_of(early, 1)
    kept = [stream.kv.get(1, 2) for stream in (early, late)]
    assert torch.equal(*kept)
    assert not torch.equal(*[stream.kv.get(2, 2) for stream in (early, late)])


def test_a_chunk_that_failed_is_made_again(pipe):
    expected = latents_of(stream_of(pipe), 5)
    calls = []

    def fails(pipe, step, t, tensors):
        calls.append(step)
        if len(calls) in (2, 19):  # in the first chunk, and in one that another had to leave for
            raise RuntimeError("not now")
        return {}

    stream, made = stream_of(pipe, callback_on_step_end=fails), []
    while len(made) < 5:
        try:
            made.append(next(stream).latents)
        except RuntimeError:
            assert all(type(block.attn1.processor).__name__ == "WanAttnProcessor" for block in pipe.transformer.blocks)
    assert torch.equal(torch.cat(made, dim=2), expected)


def test_a_decoder_or_a_recache_that_failed_goes_on_where_it_was(pipe, monkeypatch):
    def chunks(failing=None):
        stream, made = stream_of(pipe, decode=True), []
        while len(made) < 4:
            if len(made) == 3 and not stream._pending:
                stream.send(prompt="a blue square")
            if failing == len(made):
                failing = None
                with monkeypatch.context() as patch:
                    patch.setattr(pipe.vae.decoder.conv_out, "forward", fails)
                    patch.setattr(causal_stream, "remember_chunk", fails_at_the_second(causal_stream.remember_chunk))
                    with pytest.raises(RuntimeError, match="not now"):
                        next(stream)
            made.append(next(stream))
        return made

    def fails(*_):
        raise RuntimeError("not now")

    def fails_at_the_second(remember):
        calls = []

        def remembered(*arguments):
            calls.append(arguments)
            return fails() if len(calls) == 2 else remember(*arguments)

        return remembered

    expected = chunks()
    for failing in (1, 3):
        for chunk, other in zip(chunks(failing), expected, strict=True):
            assert torch.equal(chunk.latents, other.latents)
            assert (chunk.frames == other.frames).all()


def test_a_callback_sees_each_step_and_may_end_the_stream(pipe):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, round(float(t), 2)))
        pipe._interrupt = len(seen) == 6
        return {"latents": tensors["latents"] * 1}

    stream = stream_of(pipe, callback_on_step_end=callback)
    assert len(list(stream)) == 2
    steps = [(0, 1000.0), (1, 937.5), (2, 833.33), (3, 625.0)]
    assert seen == [*steps, *steps[:2]]


NEVER = {
    "teacache": {"rel_l1_thresh": 0.0, "coefficients": [1.0, 0.0]},
    "fbcache": {"rel_l1_thresh": 0.0},
    "spectrum": {"window_size": 1, "flex_window": 0},
    "easycache": {"thresh": 0.0},
}


@pytest.mark.parametrize(
    ("sampler", "policy", "granularity", "guidance_scale"),
    [
        ("renoise", "teacache", "stack", 1.0),
        ("unipc", "teacache", "per_block", 1.0),
        ("euler", "fbcache", "stack", 2.0),
        ("renoise", "always", 2, 2.0),
        ("unipc", "spectrum", "stack", 2.0),
        ("euler", "easycache", "per_block", 2.0),
    ],
)
def test_a_residual_cache_that_never_skips_changes_no_bit(pipe, sampler, policy, granularity, guidance_scale):
    changes = {"sampler": sampler, "guidance_scale": guidance_scale}
    expected = latents_of(stream_of(pipe, **changes), 5)
    pipe.enable_cache(policy, granularity=granularity, **NEVER.get(policy, {}))
    stream = stream_of(pipe, **changes)
    assert torch.equal(latents_of(stream, 4), expected[:, :, :12])
    remove = pipe.cache.on_unit(lambda ctx: (lambda residual: residual * 0.9) if ctx.step == 1 else None)
    assert not torch.equal(latents_of(stream, 1), expected[:, :, 12:])
    remove()
    assert torch.equal(latents_of(stream_of(pipe, **changes), 1), expected[:, :, :3])


@pytest.mark.parametrize(
    ("policy", "options", "granularity"),
    [
        ("spectrum", {"warmup_steps": 2}, "stack"),
        ("foca", {"cache_interval": 2, "disable_cache_before_step": 2}, 2),
        ("dmd", {"cache_interval": 2, "disable_cache_before_step": 2}, "per_block"),
        ("easycache", {"thresh": 1e9, "ret_steps": 2}, "stack"),
    ],
)
def test_forecasts_begin_anew_with_each_chunk(pipe, policy, options, granularity):
    expected = latents_of(stream_of(pipe, guidance_scale=2.0), 3)
    cache = pipe.enable_cache(policy, granularity=granularity, **options)
    stream, masks = stream_of(pipe, guidance_scale=2.0), []
    for index in range(3):
        made = next(stream).latents
        assert not torch.equal(made, expected[:, :, 3 * index :][:, :, :3])
        masks += [cache.record.mask(branch) for branch in ("cond", "uncond")]
    assert masks == [[True, True, False, True]] * 6


def test_a_chunk_whose_steps_are_skipped_has_whole_kv(pipe):
    expected = latents_of(stream_of(pipe), 2)
    pipe.enable_cache("schedule", mask=[True, False, True, False])
    stream = stream_of(pipe)
    skipped = latents_of(stream, 2)
    assert pipe.cache.plan()["transformer", "cond", 0] == (True, False, True, False)
    assert not torch.equal(skipped, expected[:, :, :6])
    keys = [stream.kv.get(1, layer) for layer in range(3)]
    stream.send(prompt=CALL["prompt"], switch="recache")
    with torch.no_grad():
        stream._change(*stream._pending[0])
    assert all(torch.equal(stream.kv.get(1, layer), key) for layer, key in enumerate(keys)), "of the whole clean chunk"


def test_edits_of_kv_and_of_units_act_on_what_follows(pipe):
    expected = latents_of(stream_of(pipe), 3)
    stream = stream_of(pipe)
    assert torch.equal(latents_of(stream, 1), expected[:, :, :3])
    key, value = pipe.kv.get(0, 1)
    pipe.kv.replace(0, 1, key=key, value=value)
    assert torch.equal(latents_of(stream, 1), expected[:, :, 3:6])
    pipe.kv.replace(0, 1, value=value * 0)
    assert not torch.equal(latents_of(stream, 1), expected[:, :, 6:])
    pipe.kv.drop(0)
    assert next(stream).statistics.window == (1, 2, 3)


def test_old_chunks_come_back_from_host_memory(pipe):
    stream = stream_of(pipe, window=12, retention=Similar(retrieved=1), store=CPUOffloadStore())
    latents_of(stream, 8)
    assert len(stream.kv.chunks) == 4
    assert stream.kv.chunks[-1] - stream.kv.chunks[0] == 7
    assert sorted([*stream.kv.chunks, *stream.kv.stored]) == list(range(8))
    assert {entry.tier for entry in stream.kv.entries()} == {"device", "host"}


def test_blocks_in_host_memory_and_a_saved_copy_give_the_same_bits(pipe, tmp_path):
    expected = latents_of(stream_of(pipe), 3)
    pipe.causal = pipe.causal.model_copy(update={"sampler": "euler"})
    pipe.save_pretrained(tmp_path)
    again = EditCausalWanPipeline.from_pretrained(tmp_path)
    assert (again.causal.sampler, again.causal.window) == ("euler", 9)
    pipe.enable_block_offload("cpu", 2**30)
    assert torch.equal(latents_of(stream_of(pipe, sampler="renoise"), 3), expected)


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_the_fast_blocks_make_the_same_chunks_up_to_rounding(pipe, rope, monkeypatch):
    expected = latents_of(stream_of(pipe, rope=rope), 4)
    fast = FastTransformer(pipe.transformer, functions=Functions())
    monkeypatch.setattr(Precompute, "_choose_fast", lambda self, *_: self._fast.update(transformer=fast))
    made = latents_of(stream := stream_of(pipe, rope=rope), 4)
    assert not torch.equal(made, expected), "other arithmetic"
    assert (made - expected).abs().max() < 1e-3
    stream.send(prompt=CALL["prompt"])
    assert next(stream).statistics.window == (0, 3, 4)


def test_memory_of_a_stream_does_not_grow(pipe):
    stream = stream_of(pipe)
    sizes = [(next(stream).statistics.kv_bytes, len(stream._known), len(stream.kv.entries())) for _ in range(12)]
    assert len(set(sizes[3:])) == 1
    layout = stream.kv.layout
    assert sizes[0][0] == 3 * 3 * layout.entry_bytes * 3 // 2, "with the rotated keys"


def test_guidance_is_warned_of_and_computed(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        stream = stream_of(pipe, guidance_scale=3.0, negative_prompt="a white background")
    assert "guidance_scale is 3.0: causal models are distilled" in caplog.text
    latents_of(stream, 2)
    assert {entry.branch for entry in stream.kv.entries()} == {"cond", "uncond"}


def test_a_model_of_the_other_kind_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match=r"is a causal model, .* EditCausalWanPipeline loads it"):
        EditWanPipeline.from_pretrained(folder)
    with pytest.raises(ModelError, match=r"is a bidirectional model, .* EditWanPipeline loads it"):
        EditCausalWanPipeline.from_pretrained(save_random_wan(tmp_path))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "CausalWanTransformer3DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for kind in (EditWanPipeline, EditCausalWanPipeline):
        with pytest.raises(ModelError, match=r"class CausalWanTransformer3DModel, .* `edit-ray convert` makes one"):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 3}, "window is 3; it must be at least 6: the sink of 3 and the current chunk of 3 latent frames"),
        ({"window": 10}, "window is 10; .* a multiple of chunk_size, 3: the nearest is 9"),
        ({"sink": 4}, "sink is 4; .* the nearest is 3"),
        ({"timesteps": [500.0, 700.0]}, r"timesteps is \[500.0, 700.0\]; they must fall"),
        ({"sampler": "heun"}, "sampler is 'heun'; it must be one of renoise, unipc, euler"),
        ({"size": 3}, "A causal model has no option size; it has chunk_size, window, sink"),
    ],
)
def test_wrong_options_are_said_before_anything_is_computed(pipe, changes, said):
    with pytest.raises(ConfigError, match=said):
        stream_of(pipe, **changes)


@pytest.mark.parametrize(("given", "nearest"), [(80, 81), (1, 9), (16, 21), (14, 9), (87, 81), (90, 93)])
def test_a_number_of_frames_without_whole_chunks_names_the_nearest(given, nearest):
    with pytest.raises(
        ValueError, match=f"num_frames is {given}; .* make 9, 21, 33 and so on: the nearest is {nearest}"
    ):
        latents_of_chunks(given, 3, 4)
    assert latents_of_chunks(nearest, 3, 4) * 4 - 3 == nearest


def test_what_a_stream_cannot_do_is_said(pipe):
    stream = stream_of(pipe, num_frames=9)
    with pytest.raises(ValueError, match="switch is 'jump'; it must be one of recache, keep, cut"):
        stream.send(prompt="a", switch="jump")
    with pytest.raises(ValueError, match="needs a prompt"):
        stream.send()
    with pytest.raises(ValueError, match="2 prompts, for a stream of 1 videos"):
        stream.send(prompt=["a", "b"])
    list(stream)
    with pytest.raises(ValueError, match="The stream has ended after 1 chunks; it takes no further prompt"):
        stream.send(prompt="a")
    with pytest.raises(ValueError, match=r"`history` is \[1, 4, 4, 4, 6\]; it must be \[1, 4, 'n \* 3', 4, 6\]"):
        stream_of(pipe, history=torch.zeros(1, 4, 4, 4, 6))
    with pytest.raises(ValueError, match="a causal model has one"):
        pipe.enable_cfg_parallel("cpu")
    assert copy.deepcopy(pipe).causal == pipe.causal
    for other in (pipe, copy.deepcopy(pipe)):
        with pytest.raises(ValueError, match="no stream of this pipeline is open"):
            other.kv  # noqa: B018
    with pytest.raises(ValueError, match="A causal model has one transformer"):
        EditCausalWanPipeline(**pipe.components | {"transformer_2": pipe.transformer})


def test_absolute_positions_end_with_the_models_table(pipe):
    stream = stream_of(pipe, rope="absolute", timesteps=[1000.0])
    latents_of(stream, 21)  # of 64 positions
    with pytest.raises(
        ValueError, match=r"Chunk 21 ends at latent frame 66; .* end at 64, with 'relative' they have no"
    ):
        next(stream)
    stream.send(prompt="a blue square", switch="cut")
    assert next(stream).statistics.window == (21,)


def test_the_defaults_are_the_published_warped_list():
    warped = [5 * s / (1 + 4 * s) * 1000 for s in (1, 0.75, 0.5, 0.25)]
    assert CausalOptions().timesteps == pytest.approx(warped)
