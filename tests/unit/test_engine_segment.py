"""The engine that a GPU actor wraps: segments equal the library's, errors end segments and not the engine."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from edit_ray.engine import segment
from edit_ray.engine.decode import to_uint8
from edit_ray.engine.loading import choose_device, load_pipeline, usable_cores, with_flow_shift
from edit_ray.engine.options import ModelOptions, SamplingOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.errors import ModelError, RunCancelled, SegmentFailed
from edit_ray.runs.run_plan import FrameLayout
from tests.decoding import decode_at_once

PROMPTS = ("a red circle", "a blue square")
SAMPLING = SamplingOptions(
    height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=4.0, negative_prompt="black"
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")]


@pytest.fixture(scope="module")
def loaded(model):
    return load_pipeline(ModelOptions(path=str(model), device="cpu"))


@pytest.fixture
def engine(loaded):
    return SegmentEngine(copy.deepcopy(loaded))


def by_library(loaded, sampling=SAMPLING, *, prompt=PROMPTS[0], seed=3, **kwargs):
    """What a user of the library gets for the same words and numbers."""
    arguments = sampling.model_dump(include=segment.ARGUMENTS)
    pipe = copy.deepcopy(loaded)
    pipe.scheduler = with_flow_shift(pipe.scheduler, sampling.flow_shift)
    generator = torch.Generator().manual_seed(seed)
    negative = sampling.negative_prompt
    return pipe(prompt, negative, generator=generator, output_type="latent", **arguments, **kwargs).frames


@pytest.mark.one_in(2)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("flow_shift", [3.0, 5.0])
def test_a_segment_equals_the_librarys(engine, loaded, guidance_scale, flow_shift):
    sampling = SAMPLING.model_copy(update={"guidance_scale": guidance_scale, "flow_shift": flow_shift})
    engine.encode_prompts(PROMPTS, sampling.negative_prompt)
    latents = engine.denoise(sampling, prompt=PROMPTS[0], seed=3)
    assert (latents.dtype, latents.device.type, latents.shape) == (torch.float32, "cpu", (1, 4, 3, 4, 6))
    assert torch.equal(latents, by_library(loaded, sampling))
    history = latents[:, :, -1:]
    continued = engine.denoise(sampling, prompt=PROMPTS[1], seed=4, history=history)
    assert torch.equal(continued, by_library(loaded, sampling, prompt=PROMPTS[1], seed=4, history=history))


def test_settings_of_one_segment_do_not_reach_the_next(engine):
    first = engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3)
    noise_scheduler = engine.pipe.scheduler
    engine.denoise(SAMPLING.model_copy(update={"flow_shift": 7.0}), prompt=PROMPTS[1], seed=3)
    assert engine.pipe.scheduler.config.flow_shift == 7.0
    assert noise_scheduler.config.flow_shift == 3.0
    assert torch.equal(engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3), first)
    assert not torch.equal(engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=4), first)


def test_prompts_are_encoded_once_and_up_front(engine, monkeypatch):
    encoded = []
    encode = engine.pipe.encode_prompt
    monkeypatch.setattr(
        engine.pipe, "encode_prompt", lambda prompt, *a, **kw: encoded.append(prompt) or encode(prompt, *a, **kw)
    )
    engine.encode_prompts([*PROMPTS, PROMPTS[0]], "black")
    assert encoded == [*PROMPTS, "black"]
    monkeypatch.setattr(engine.pipe, "text_encoder", None)
    engine.denoise(SAMPLING, prompt=PROMPTS[1], seed=3)
    assert encoded[3:] == [None], "the pipeline is given embeddings, not words"


def test_embeddings_that_are_asked_for_again_are_not_let_go(engine, monkeypatch):
    monkeypatch.setattr(segment, "KEPT_PROMPTS", 2)
    first = engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3)
    for prompt in (PROMPTS[1], "a green circle", PROMPTS[0]):
        latents = engine.denoise(SAMPLING, prompt=prompt, seed=3)
    assert torch.equal(latents, first)


def test_on_step_counts_and_may_stop(engine):
    steps = []
    whole = engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3, on_step=lambda *done: steps.append(done))
    assert steps == [(1, 3), (2, 3), (3, 3)]

    def stop(done, total):
        if done == 2:
            raise RunCancelled("stopped on request")

    with pytest.raises(RunCancelled):
        engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3, on_step=stop)
    assert torch.equal(engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3), whole)


def test_latents_that_are_not_finite_fail_the_segment(engine):
    with torch.no_grad():
        engine.pipe.transformer.proj_out.bias[0] = float("nan")
    with pytest.raises(SegmentFailed, match="seed 3 has latents that are not finite"):
        engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3)


@pytest.fixture
def stream(engine):
    """Four segments with one history latent: [(position, new latents), …], and the whole stream."""
    layout, parts, tail = FrameLayout(SAMPLING.num_frames, history_latents=1, fps=16), [], None
    for index in range(4):
        latents = engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=index, history=tail)
        position = layout.first_latent(index)
        parts.append((position, latents[:, :, position - layout.first_latent(index + 1) :]))
        tail = latents[:, :, -1:]
    return parts, torch.cat([new for _, new in parts], dim=2)


def frames_at_once(engine, latents):
    return to_uint8(decode_at_once(engine.pipe.vae, latents))


def test_a_lost_or_misplaced_decoder_is_rebuilt(engine, stream):
    parts, whole = stream
    expected = frames_at_once(engine, whole)
    asked = []

    def preceding(count):
        asked.append(count)
        return whole[:, :, position - count : position]

    for index in (2, 3, 3, 1):  # a new process, the next one, that one again, an earlier one again
        position, new = parts[index]
        frames = engine.decode("run", new, position=position, preceding=preceding)
        assert torch.equal(frames, expected[4 * position - 3 :][: len(frames)])
    assert asked == [5, 7, 3]
    engine.release("run")
    with pytest.raises(ValueError, match="decoded up to latent 0, not 3"):
        engine.decode("run", parts[1][1], position=3)


def test_threads_are_set_and_default_to_all_cores(model):
    before = torch.get_num_threads()
    options = ModelOptions(path=str(model), device="cpu", torch_dtype="bfloat16")
    try:
        for given, expected in ((None, usable_cores()), (1, 1)):
            engine = SegmentEngine.load(options, given)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert engine.device == torch.device("cpu")
    assert engine.pipe.transformer.dtype == torch.bfloat16
    assert engine.denoise(SAMPLING, prompt=PROMPTS[0], seed=3).dtype == torch.float32


def test_flow_shift_is_called_shift_by_flow_match_euler():
    noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert with_flow_shift(noise_scheduler, 3.0) is noise_scheduler
    rebuilt = with_flow_shift(noise_scheduler, 5.0)
    assert (type(rebuilt), rebuilt.config.shift) == (type(noise_scheduler), 5.0)
    rebuilt.set_timesteps(4)
    noise_scheduler.set_timesteps(4)
    assert not torch.equal(rebuilt.sigmas, noise_scheduler.sigmas)


def test_a_model_that_cannot_be_used_is_named(tmp_path, model):
    index = '{"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}'
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ModelError, match="cannot be loaded as a Wan model"):
        load_pipeline(ModelOptions(path=str(tmp_path), device="cpu"))
    with pytest.raises(ModelError, match="'float16'; it must be one of float32, bfloat16"):
        load_pipeline(ModelOptions(path=str(model), device="cpu", torch_dtype="float16"))


def test_models_that_are_loaded_at_once_have_all_their_weights(model):
    with ThreadPoolExecutor(3) as threads:
        pipes = list(threads.map(load_pipeline, [ModelOptions(path=str(model), device="cpu")] * 6))
    weights = [pipe.transformer.state_dict() for pipe in pipes]
    assert all(not weight.is_meta for of_pipe in weights for weight in of_pipe.values())
    assert all(weights[0][name].equal(other[name]) for other in weights[1:] for name in weights[0])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_a_pickle_are_refused_unread(model, tmp_path, part):
    folder = shutil.copytree(model, tmp_path / "wan")
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(weights), weights.with_name(name))
    weights.unlink()
    with pytest.raises(ModelError, match=r"safetensors"):
        load_pipeline(ModelOptions(path=str(folder), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_devices_without_cuda():
    assert choose_device("cpu").type == choose_device("auto").type == "cpu"
    with pytest.raises(ModelError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize(("kept", "decoded"), [(1, 13), (2, 9)])
def test_the_decoder_states_of_the_latest_runs_are_kept(engine, kept, decoded):
    """Three runs take turns; what was given up is made again from latents, one by one, to the same frames."""
    engine.max_live_decoders, count = kept, []
    latents = dict(zip("abc", torch.randn(3, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), strict=True))
    hook = engine.pipe.vae.decoder.register_forward_pre_hook(lambda *_: count.append(1))
    frames = {run: [] for run in latents}

    def preceding(number):
        return latents[run][:, :, position - number : position]

    for run in "ababcba":
        position = len(frames[run])
        new = latents[run][:, :, position : position + 1]
        frames[run].append(engine.decode(run, new, position=position, preceding=preceding))
    assert len(count) == decoded
    hook.remove()
    for run, parts in frames.items():
        assert torch.equal(torch.cat(parts), frames_at_once(engine, latents[run][:, :, : len(parts)]))
