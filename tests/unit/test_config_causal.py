"""Runs of causal models in a configuration: defaults, and one sentence for each mistake; before anything is loaded."""

import json

import pytest

from edit_ray.config import Config, load_config
from edit_ray.engine.causal_options import CausalOptions, options_of_run
from edit_ray.engine.model_info import read_model_info
from edit_ray.errors import ConfigError
from edit_ray.testing import save_random_wan

RUN = """
video: {num_segments: 4}
sampling: {height: 32, width: 32}
continuity: {mode: causal}
prompt_segments: [{segment: 0, prompt: a red circle}, {segment: 2, prompt: a blue square}]
"""
OWN = {"chunk_size": 3, "window": 12, "sink": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("causal")
    save_random_wan(root / "causal", causal=OWN)
    save_random_wan(root / "wide", causal={"chunk_size": 8, "window": 32, "sink": 8})
    save_random_wan(root / "history", expand_timesteps=True)
    (root / "run.yaml").write_text(RUN)
    for name in ("foreign", "damaged"):
        index = json.loads((root / "causal" / "model_index.json").read_text())
        if name == "foreign":
            del index["causal"]
            index["transformer"] = ["diffusers", "CausalWanTransformer3DModel"]
        else:
            index["causal"]["window"] = 7
        save_random_wan(root / name, causal=OWN)
        (root / name / "model_index.json").write_text(json.dumps(index))
    return root


def loaded(folder, *overrides, model="causal"):
    return load_config(folder / "run.yaml", [f"model.path={folder / model}", *overrides])


def problems_of(folder, *overrides, model="causal"):
    with pytest.raises(ConfigError) as caught:
        loaded(folder, *overrides, model=model)
    return caught.value.problems


def test_a_causal_run_has_defaults_of_its_own(folder):
    config = loaded(folder)
    sampling = config.sampling
    assert (sampling.num_frames, sampling.num_inference_steps, sampling.guidance_scale) == (81, 4, 1.0)
    assert config.layout.frames_of(0) == 81
    assert config.layout.frames_of(1) == config.layout.frames_of(3) == 84
    assert config.num_frames_total == 81 + 3 * 84
    assert [scene.switch for scene in config.storyboard.scenes] == ["recache", "recache"]
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_chunks_and_num_frames_say_the_same(folder):
    assert loaded(folder, "continuity.chunks=1").sampling.num_frames == 9
    assert loaded(folder, "sampling.num_frames=33").continuity.chunks == 3
    assert loaded(folder, "sampling.num_frames=33", "continuity.chunks=3").layout.latent_frames == 9
    wide = loaded(folder, "continuity.chunk_size=8", "continuity.chunks=2", model="wide")
    assert (wide.sampling.num_frames, wide.layout.latent_frames) == (61, 16)


def test_the_model_s_options_are_changed_by_those_that_are_given(folder):
    base = read_model_info(str(folder / "causal")).causal
    assert base == CausalOptions(**OWN)

    def options_with(*overrides):
        config = loaded(folder, *overrides)
        return options_of_run(base, config.continuity, config.sampling)

    assert options_with() == base
    given = options_with("continuity.window=21", "continuity.sink=0", "continuity.context_noise=5.0")
    assert (given.window, given.sink, given.context_noise, given.rope) == (21, 0, 5.0, "relative")
    levels = [f"sampling.sigmas.{index}={sigma}" for index, sigma in enumerate((1.0, 0.75, 0.5, 0.25))]
    published = options_with(*levels, "sampling.sampler=unipc")
    assert published.timesteps == pytest.approx([1000.0, 937.5, 2500 / 3, 625.0])
    assert published.sampler == "unipc"
    assert options_with(*levels[:2], "sampling.flow_shift=1.0").timesteps == pytest.approx([1000, 750])


WARM = [f"cache.{text}" for text in ("policy=warmstart_reuse", "inner=fbcache", "rel_l1_thresh=0.1", "warm_steps=2")]
WRONG = [
    ("causal", ["sampling.num_frames=80"], "sampling.num_frames is 80; chunks of 3 latent frames make 9, 21, 33 and "),
    ("causal", ["sampling.num_frames=80"], "the nearest is 81."),
    (
        "causal",
        ["sampling.num_frames=33", "continuity.chunks=7"],
        "and continuity.chunks 7, which makes 81; one of them",
    ),
    ("causal", ["continuity.window=4"], "continuity.window is 4; it must be at least 6: the sink of 3 and the cur"),
    ("causal", ["continuity.window=13"], "continuity.window is 13; K/V is kept by whole chunks, so it must be a mu"),
    ("causal", ["continuity.sink=12"], "continuity.window is 12; it must be at least 15: the sink of 12 and the "),
    ("causal", ["continuity.sink=2"], "continuity.sink is 2; K/V is kept by whole chunks"),
    ("causal", ["continuity.rope=true"], "continuity.rope is true; it must be one of relative, absolute"),
    ("causal", ["continuity.mode=history"], "continuity.mode is 'history'; it must be causal for this model, which ma"),
    ("causal", ["continuity.mode=overlap"], "continuity.mode is 'overlap'; it must be causal for this model"),
    ("causal", ["continuity.mode=none"], "continuity.mode is 'none'; it must be causal for this model"),
    ("history", [], "continuity.mode is 'causal', and this model is bidirectional: it makes a"),
    ("wide", [], "continuity.chunk_size is 3; it must be 8, which this model's chunks have"),
    ("causal", ["sampling.num_inference_steps=30"], "sampling.num_inference_steps is 30; it must be 4 for this model"),
    ("causal", ["sampling.sampler=dpm++"], "sampling.sampler is 'dpm++'; it must be one of renoise, unipc, euler whe"),
    (
        "causal",
        ["sampling.negative_prompt=background"],
        "has no effect at guidance_scale 1, which causal models are made",
    ),
    ("causal", ["prompt_segments.1.negative_prompt=a"], "prompt_segments.1.negative_prompt 'a' has no effect"),
    ("causal", [*WARM, "cache.reuse_window=1"], "it must be 0 where cont"),
    (
        "causal",
        ["engine.cfg_parallel=true"],
        "engine.cfg_parallel is true; it must be false where continuity.mode is c",
    ),
    (
        "causal",
        ["prompt_segments.0.image=a.png"],
        "prompt_segments.0.image is given; a causal run begins with its prompt",
    ),
    ("causal", ["prompt_segments.1.last_image=a.png"], "prompt_segments.1.last_image is given"),
    ("causal", ["continuity.init=a.png"], "a causal run begins with its prompt, and takes no picture and no clip"),
    ("causal", ["continuity.adain=0.1"], "continuity.adain is 0.1; it must be 0 where continuity.mode is causal"),
    ("causal", ["continuity.kv=commit", "video.num_segments=null"], "an endless run must have kv recache"),
    (
        "causal",
        ["continuity.kv=commit", "output.keep_segments=2"],
        "output.keep_segments is 2 and continuity.kv 'commit'",
    ),
    ("causal", ["continuity.kv=commit", "store.disk_bytes=50000"], "it must be at least 50688 where continuity.kv is"),
    ("causal", ["continuity.kv=commit", "store.host_bytes=2000"], "it must be at least 2304 where continuity.kv is"),
    (
        "causal",
        ["continuity.kv=commit", "prompt_segments.1.guidance_scale=2"],
        "with continuity.kv commit both must be above 1 or neither.",
    ),
    ("causal", ["prompt_segments.1.switch=fade"], "is 'fade'; it must be one of recache, keep, cut"),
    (
        "history",
        ["continuity.mode=history", "prompt_segments.1.switch=keep"],
        "prompt_segments.1.switch is 'keep'; it needs continuity.mode causal",
    ),
    (
        "history",
        ["continuity.mode=none", "continuity.window=9"],
        "continuity.window is 9; it needs continuity.mode causal.",
    ),
    ("foreign", [], "which diffusers does not have: `edit-ray convert` makes one of it"),
    ("damaged", [], "has causal options in its model_index.json that cannot be: window is 7; "),
]


@pytest.mark.parametrize(("model", "overrides", "words"), WRONG, ids=[words[:50] for _, _, words in WRONG])
def test_what_cannot_be_is_one_sentence(folder, monkeypatch, model, overrides, words):
    monkeypatch.chdir(folder)
    found = problems_of(folder, *overrides, model=model)
    assert [problem for problem in found if words in problem], found
    if "png" not in str(overrides):  # else the file is missing as well
        assert len(found) == 1, found


def test_absolute_positions_end_with_the_model_s_table(folder):
    """64 latent frames of this model: three segments of 21 between two cuts, and not four."""
    absolute = "continuity.rope=absolute"
    said = "continuity.rope is 'absolute', with which this model's videos end after 64 latent frames, and this one has "
    assert said + "84 latent frames without a cut" in problems_of(folder, absolute)[0]
    assert said + "no end" in problems_of(folder, absolute, "video.num_segments=null")[0]
    loaded(folder, absolute, "video.num_segments=3")
    loaded(folder, absolute, "prompt_segments.1.switch=cut", "video.num_segments=5")
