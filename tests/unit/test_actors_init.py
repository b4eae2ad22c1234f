"""Runs that begin from the user's own picture or clip, through the actors' plain classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.local import LocalWorker
from edit_ray.actors.messages import RunSpec
from edit_ray.config import Config, check_config, load_config
from edit_ray.engine.continuity import load_latents
from edit_ray.engine.decode import StreamingDecoder, to_uint8
from edit_ray.engine.init_file import read_init
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.segment import SegmentEngine
from edit_ray.engine.vae_stream import encode_video, to_video
from edit_ray.errors import ConfigError
from edit_ray.video.encode import OutputOptions, encode, read_frames

SEGMENTS, SIZE = 3, {"height": 32, "width": 48}
SHOWN = ("first_frame", "still")
FRAMES_OF = {"picture": [17, 12, 12], "clip": [12, 12, 12]}


@pytest.fixture
def files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (9, 40, 64, 3), np.uint8)
    Image.fromarray(noise[0]).save(tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes(encode(noise, fps=16, options=OutputOptions(crf=0)))
    return {"picture": str(tmp_path / "a.png"), "clip": str(tmp_path / "a.mp4")}


def spec_for(root, model, init, run_id="one", **continuity):
    config = {
        "model": {"path": str(model)},
        "sampling": {**SIZE, "num_frames": 17, "num_inference_steps": 2, "seed": 5},
        "video": {"num_segments": SEGMENTS},
        "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
        "continuity": {"history_latents": 2, "init": init} | continuity,
        "engine": {"cpu_threads": 1},
    }
    spec = RunSpec(run_id, root, Config.model_validate(config), SEGMENTS)
    assert check_config(spec.config) == []
    spec.folder.create("", spec.begun("", {})).close()
    return spec


def segments_of(spec):
    return [spec.segment(index) for index in range(SEGMENTS)]


def make(spec, *, lose=False):
    """All segments by one GPU actor, or each call by a new one; their latents."""
    denoiser = DenoiserActor(LocalWorker())
    denoiser.prepare_run(spec)

    def next_one():
        if not lose:
            return denoiser
        another = DenoiserActor(LocalWorker())
        another.adopt_run(spec)
        return another

    for segment in segments_of(spec):
        next_one().denoise_segment(spec, segment, 0)
        next_one().decode_segment(spec, segment)
        next_one().encode_segment(spec, segment)
    return [load_latents(spec.folder.latents(segment.index)) for segment in segments_of(spec)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["picture", "clip"])
@pytest.mark.parametrize("continuity", [{"mode": "history"}, {"mode": "overlap"}], ids=["history", "overlap"])
def test_what_is_shown_of_it_and_what_is_made_of_it(tmp_path, model, files, kind, continuity):
    spec = spec_for(tmp_path, model, files[kind], **continuity)
    parts = make(spec)
    assert [segment.num_frames for segment in segments_of(spec)] == FRAMES_OF[kind]
    given = load_latents(spec.folder.init_latents)
    vae = EditWanPipeline.from_pretrained(model).vae
    frames = read_init(files[kind], frames=1 if kind == "picture" else 5, **SIZE)
    assert torch.equal(given, encode_video(vae, to_video(frames)))
    if kind == "picture":
        assert torch.equal(parts[0][:, :, :1], given), "the video begins with the picture"
        stream, before = torch.cat(parts, dim=2), 0
    else:
        stream, before = torch.cat([given, *parts], dim=2), 5
    at_once = to_uint8(StreamingDecoder(vae).decode(stream))[before:]
    assert len(at_once) == spec.config.num_frames_total == sum(FRAMES_OF[kind])
    first = 0
    for segment in segments_of(spec):
        shown = read_frames(spec.folder.media(segment.index), **SIZE, init=spec.folder.init)
        wanted = at_once[first : first + len(shown)].numpy()
        draft = tmp_path / "wanted.mp4"
        draft.write_bytes(encode(wanted, fps=16, options=spec.config.output))
        assert np.array_equal(shown, read_frames(draft, **SIZE)), "as the joined stream decodes"
        first += len(shown)
    assert first == len(at_once)


@pytest.mark.parametrize("kind", [pytest.param("picture", marks=pytest.mark.slow), "clip"])
def test_lost_actors_and_a_lost_file_change_nothing(tmp_path, model, files, kind):
    whole = make(spec_for(tmp_path, model, files[kind], mode="overlap"))
    hurt_spec = spec_for(tmp_path, model, files[kind], "hurt", mode="overlap")
    DenoiserActor(LocalWorker()).prepare_run(hurt_spec)
    (tmp_path / files[kind]).write_bytes(b"another file by now")
    hurt = make(hurt_spec, lose=True)
    assert all(torch.equal(one, other) for one, other in zip(whole, hurt, strict=True))


def test_a_picture_can_be_shown_as_the_end_of_a_still_clip(tmp_path, model, files):
    """The model sees a latent of four equal frames; the video begins with that of the picture all the same."""
    specs = [spec_for(tmp_path, model, files["picture"], as_, mode="history", picture_as=as_) for as_ in SHOWN]
    first, still = map(make, specs)
    given = load_latents(specs[1].folder.init_latents)
    frames = read_init(files["picture"], frames=1, **SIZE).repeat(5, axis=0)
    assert torch.equal(given, encode_video(EditWanPipeline.from_pretrained(model).vae, to_video(frames)))
    assert torch.equal(still[0][:, :, :1], first[0][:, :, :1])
    assert not torch.equal(still[0][:, :, 1:], first[0][:, :, 1:])
    engine = SegmentEngine(EditWanPipeline.from_pretrained(model))
    sampling, segment = specs[1].config.sampling, specs[1].segment(0)
    window = engine.denoise(sampling, prompt=segment.prompt, seed=segment.seed, history=given[:, :, 1:])
    assert torch.equal(still[0][:, :, 1:], window[:, :, 1:])


def test_segment_0_follows_the_file(tmp_path, model, files):
    free = make(spec_for(tmp_path, model, None, "free", mode="history"))
    held = make(spec_for(tmp_path, model, files["picture"], "held", mode="history"))
    assert not torch.equal(free[0][:, :, 1:], held[0][:, :, 1:])


def test_a_file_that_is_gone_before_the_run_begins_ends_it_with_a_sentence(tmp_path, model, files):
    spec = spec_for(tmp_path, model, files["clip"], mode="history")
    (tmp_path / files["clip"]).unlink()
    with pytest.raises(ConfigError, match=r"continuity\.init is .*a\.mp4', which is not a file here"):
        DenoiserActor(LocalWorker()).prepare_run(spec)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["continuity.init=a.txt"], "continuity.init is 'a.txt'; it must be the path of a picture (.png, "),
        (["continuity.init=''"], "continuity.init is ''; it must be the path of a picture"),
        (["continuity.init=a.png", "continuity.mode=none"], "it needs continuity.mode history, overlap, image or svi"),
        (["continuity.init=missing.png"], "missing.png', which is not a file here"),
        (
            ["continuity.init=a.mp4", "continuity.history_latents=4"],
            "has 9 frames; with this continuity.history_latents",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_file_that_cannot_be_is_refused_with_the_configuration(tmp_path, files, monkeypatch, overrides, words):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "run.yaml"
    good.write_text(
        "video: {num_segments: 2}\nprompt_segments: [{segment: 0, prompt: a red circle}]\ncontinuity: {mode: history}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(good, overrides)
    (problem,) = caught.value.problems
    assert words in problem


def test_a_relative_path_is_made_absolute_where_the_configuration_is_read(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.model_validate(
        {
            "video": {"num_segments": 1},
            "prompt_segments": [{"segment": 0, "prompt": "a"}],
            "continuity": {"mode": "history", "init": "a.png"},
        }
    )
    assert config.continuity.init == files["picture"]
    assert Config.model_validate(config.model_dump(mode="json")) == config
