"""The fastest policy at a likeness: the search on measures that are known, and the command on a tiny pipeline."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray import EditWanPipeline
from edit_ray.cli import main
from edit_ray.engine.tune import TUNABLE, PolicyUnfit, Videos, best, psnr_of, tune
from edit_ray.testing import save_random_wan

CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 5, "guidance_scale": 3.0}
PROMPTS = ["a red circle", "a blue square", "a green circle"]


def made_up(noise, videos, asked=None, spread=4.0):
    """PSNR falls and speed rises with the threshold; policies differ in how good they are."""

    def measure(policy, options):
        (value,) = options.values()
        x = value / 60 if policy == "ranked" else value
        skill = {"ranked": 1.5, "dicache": 1.2}.get(policy, 1.0)
        for _ in range(videos):
            if asked is not None:
                asked.append((policy, value))
            psnr = 45 - 30 * x / skill + noise.gauss(0, spread)
            yield psnr, max(0.2, 1 - x / 2)

    return measure


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(20, 40))
def test_what_is_chosen_holds_with_confidence_and_is_the_fastest_of_those(seed, psnr):
    trials = list(tune(made_up(random.Random(seed), 40), psnr))
    found = best(trials)
    holding = [trial for trial in trials if trial.verdict == "holds"]
    assert all(trial.low >= psnr for trial in holding)
    if found is None:
        assert not holding
    else:
        assert found.blocks == min(trial.blocks for trial in holding)
        assert found.psnr >= psnr


def test_the_mean_on_other_videos_holds_nearly_always():
    noise, held = random.Random(1), 0
    for _ in range(100):
        found = best(list(tune(made_up(noise, 40, spread=6.0), 28, ["dicache"])))
        unseen = [psnr for psnr, _ in made_up(noise, 400, spread=6.0)(found.policy, found.options)]
        held += sum(unseen) / len(unseen) >= 28 - 0.5
    assert held >= 93


def test_the_threshold_comes_near_the_highest_that_holds():
    found = best(list(tune(made_up(random.Random(0), 10, spread=0.0), 30, ["dicache"])))
    highest = 15 * 1.2 / 30
    assert 0.9 * highest < found.options["rel_l1_thresh"] <= highest


def test_what_cannot_win_is_given_up_early():
    asked = []
    trials = list(tune(made_up(random.Random(0), 40, asked, spread=0.5), 30))
    by_verdict = {
        verdict: [asked.count((t.policy, *t.options.values())) for t in trials if t.verdict == verdict]
        for verdict in ("holds", "too far", "slower")
    }
    assert all(count == 40 for count in by_verdict["holds"])
    assert min(by_verdict["too far"]) == 4
    assert set(by_verdict["slower"]) == {4}


def test_a_policy_that_cannot_work_here_is_left_out():
    good = made_up(random.Random(0), 8)

    def measure(policy, options):
        if policy == "teacache":
            raise PolicyUnfit("no coefficients")
        yield from good(policy, options)

    assert {trial.policy for trial in tune(measure, 30)} == set(TUNABLE) - {"teacache"}


def test_what_fails_in_a_video_is_said_and_is_no_policy_that_cannot_work_here(folder, monkeypatch):
    pipe = EditWanPipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    videos = Videos(pipe, PROMPTS[:1], 5, CALL)
    assert [trial.policy for trial in tune(videos, 30, ["teacache"])] == [], "nobody has calibrated the model"
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        list(tune(videos, 30, ["seacache"]))
    assert pipe.cache is None


def test_nothing_holds_where_nothing_can():
    assert best(list(tune(made_up(random.Random(0), 8), 99))) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan")


def test_videos_are_measured_against_their_own_uncached_ones(folder):
    pipe = EditWanPipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    videos = Videos(pipe, PROMPTS[:2], 5, CALL, seeds=2)
    assert list(videos("always", {})) == [(100.0, 1.0)] * 4
    some = list(videos("schedule", {"mask": [1, 0, 1, 0, 1]}))
    assert len(some) == 4
    assert all(psnr < 100 and share == pytest.approx(0.6) for psnr, share in some)
    assert len({psnr for psnr, _ in some}) == 4, "every prompt and seed has a video of its own"
    assert pipe.cache is None
    reference = videos._frames(3)
    pipe.enable_cache("schedule", 5, mask=[1, 0, 1, 0, 1])
    assert psnr_of(videos._frames(3), reference) == some[3][0]
    pipe.disable_cache()


@pytest.fixture
def command(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {folder}, device: cpu}}\n"
        "sampling: {height: 32, width: 32, num_frames: 5, num_inference_steps: 5}\n"
        "video: {num_segments: 1}\ncontinuity: {mode: none}\n"
        "prompt_segments: [{segment: 0, prompt: a green circle}]\n"
    )
    return ["tune", "--config", str(config), "--prompts", str(tmp_path / "prompts.txt")]


def test_the_command_prints_the_section_for_a_configuration(command, capsys):
    assert main([*command, "--psnr", "40", "--policies", "seacache"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("cache: {policy: ")
    assert "dB (at least" in printed.err


def test_the_command_says_that_nothing_holds(command, capsys, monkeypatch):
    monkeypatch.setitem(TUNABLE, "seacache", ("threshold", 2.9, 3.0))
    assert main([*command, "--psnr", "99.9", "--policies", "seacache"]) == 1
    assert "no setting of seacache keeps 99.9 dB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--psnr", "0"], "--psnr is 0; it must be above 0"),
        (["--psnr", "nan"], "--psnr is nan"),
        (["--psnr", "30", "--seeds", "0"], "--seeds is 0"),
        (["--psnr", "30", "--policies", "dicache,best"], "--policies has best; valid are ranked, dicache"),
    ],
)
def test_what_cannot_be_tuned_ends_with_code_2_and_a_sentence(command, arguments, words, capsys):
    assert main([*command, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


def test_one_video_is_not_enough(command, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    assert main([*command, "--psnr", "30"]) == 2
    assert "one video says nothing of others" in capsys.readouterr().err
