"""Calibrating, ranking and tuning: on measures that are known, on a tiny pipeline, and as commands."""

import json
import random
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache import relative_l1
from edit_ray.cache.policies.schedule import ranks_of
from edit_ray.cli import main
from edit_ray.engine.calibration import FILE_NAME, read_calibration
from edit_ray.engine.loading import with_flow_shift
from edit_ray.testing import save_random_wan
from edit_ray.tuning.calibrate import Measured, fit_magcache, fit_teacache, observe, plot_fit
from edit_ray.tuning.likeness import Likeness
from edit_ray.tuning.likeness import psnr as psnr_of
from edit_ray.tuning.rank import SkipMeasure, rank_skips
from edit_ray.tuning.tune import TUNABLE, best, tune
from edit_ray.tuning.videos import PolicyUnfit, Videos, blocks_share
from tests.calls import cached, load

STEPS = 5
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 4.0}
PROMPTS = ["a red circle", "a blue square", "a green circle"]
EXPERTS = ("transformer", "transformer_2")
COND, UNCOND = "transformer/cond", "transformer/uncond"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder, device="cpu")


@pytest.fixture
def pipe(loaded, folder):
    noise_scheduler = loaded.scheduler
    yield loaded
    loaded.disable_cache()
    loaded.scheduler = noise_scheduler
    (folder / FILE_NAME).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    return load(save_random_wan(tmp_path_factory.mktemp("two"), two_experts=True, boundary_ratio=0.8), device="cpu")


# Calibrating


@pytest.fixture(scope="module")
def measured(loaded):
    """Two prompts by themselves, and both together."""
    alone = (observe(loaded, [prompt], 3 + i, CALL) for i, prompt in enumerate(PROMPTS[:2]))
    return *alone, observe(loaded, PROMPTS[:2], 3, CALL)


def test_what_is_measured_is_what_the_model_does(loaded, measured):
    """Read from the outside, at the model's own modules, over one call."""
    signals, hidden, residuals = [], [], []
    model = loaded.transformer
    hooks = [
        model.condition_embedder.time_embedder.register_forward_hook(lambda m, args, out: signals.append(out)),
        model.blocks[0].register_forward_pre_hook(lambda m, args: hidden.append(args[0])),
        model.blocks[-1].register_forward_hook(lambda m, args, out: residuals.append(out - hidden[-1])),
    ]
    loaded(PROMPTS[0], generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
    for hook in hooks:
        hook.remove()
    assert len(signals) == len(residuals) == 2 * STEPS  # cond and uncond take turns
    for first, owner in enumerate((COND, UNCOND)):
        seen, own = measured[0][owner], residuals[first::2]
        assert seen.signal == pytest.approx([relative_l1(b, a) for a, b in pairwise(signals[first::2])], rel=1e-4)
        assert seen.change == pytest.approx([relative_l1(b, a) for a, b in pairwise(own)], rel=1e-4)
        ratios = [(b.norm(dim=-1) / a.norm(dim=-1)).mean().item() for a, b in pairwise(own)]
        assert seen.ratios == [pytest.approx(dict(enumerate(ratios, start=1)), rel=1e-4)]


def test_prompts_are_measured_one_after_the_other_with_seeds_of_their_own(measured):
    one, two, both = measured
    assert set(both) == {COND, UNCOND}
    for owner, seen in both.items():
        parts = [getattr(one[owner], field) + getattr(two[owner], field) for field in ("signal", "change", "ratios")]
        assert seen == Measured(*parts)
        assert one[owner].signal == two[owner].signal, "timesteps alone decide on it"
        assert one[owner].change != two[owner].change


def test_observing_leaves_the_model_uncached_even_if_it_fails(pipe):
    with pytest.raises(ValueError, match="divisible by 16"):
        observe(pipe, PROMPTS[:1], 0, {**CALL, "height": 33})
    assert pipe.cache is None


def test_experts_are_measured_apart(two_experts):
    measured = observe(two_experts, PROMPTS[:1], 0, CALL)
    assert set(measured) == {f"{expert}/{branch}" for expert in EXPERTS for branch in ("cond", "uncond")}
    high, low = (list(measured[f"{expert}/cond"].ratios[0]) for expert in EXPERTS)
    assert high == list(range(1, len(high) + 1))
    assert low == list(range(len(high) + 2, STEPS))  # each expert's first step has nothing before it
    ratios = fit_magcache(measured, STEPS)["mag_ratios"]
    assert {len(of_owner) for of_owner in ratios.values()} == {STEPS}
    assert ratios["transformer_2/cond"][: len(high) + 2] == [1.0] * (len(high) + 2)
    with cached(two_experts, "teacache", STEPS, **fit_teacache(measured, False)):
        pass


def test_signals_are_those_that_teacache_will_see(pipe):
    for use_ret_steps in (False, True):
        measured = observe(pipe, PROMPTS[:1], 3, CALL, use_ret_steps=use_ret_steps)
        options = fit_teacache(measured, use_ret_steps)
        assert options["use_ret_steps"] is use_ret_steps
        with cached(pipe, "teacache", STEPS, rel_l1_thresh=1e-9, **options) as cache:
            pipe(PROMPTS[0], output_type="latent", **CALL)
            seen = [decision.signal for decision in cache.record if decision.branch == "cond"]
        assert seen == [None, *measured[COND].signal]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 2), min_size=5, max_size=5), st.integers(5, 30))
def test_a_fit_finds_the_polynomial_that_made_the_data(coefficients, count):
    signal = [float(x) for x in np.linspace(0.1, 1.5, count)]
    change = [float(np.polyval(coefficients, x)) for x in signal]
    fitted = fit_teacache({COND: Measured(signal, change)}, False)["coefficients"][COND]
    assert np.polyval(fitted, signal) == pytest.approx(change, rel=1e-6)
    assert fitted == pytest.approx(coefficients, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(
    ("signal", "change", "coefficients"),
    [
        ([0.5], [0.2], [0.2]),
        ([0.5, 0.5], [0.2, 0.2], [0.2]),
        ([0.0, 1.0, 1.0], [1.0, 3.0, 3.0], [2.0, 1.0]),
        ([0.5, 0.5], [1.0, 3.0], [1.2]),  # weighted by 1 / change: (1/1 + 1/3) / (1/1² + 1/3²)
    ],
)
def test_few_points_give_a_lower_degree_and_small_changes_count_as_much(signal, change, coefficients):
    fitted = fit_teacache({COND: Measured(signal, change)}, False)["coefficients"][COND]
    assert fitted == pytest.approx(coefficients)


def test_ratios_are_the_mean_over_calls():
    seen = Measured(ratios=[{1: 0.8, 2: 0.6}, {1: 0.9, 3: 0.5}, {}])
    assert fit_magcache({COND: seen}, 5)["mag_ratios"][COND] == pytest.approx([1.0, 0.85, 0.6, 0.5, 1.0])


def test_plots_show_what_was_measured_and_what_was_fitted(measured):
    pytest.importorskip("matplotlib")
    for fitted, count in ((fit_teacache(measured[2], False), 200), (fit_magcache(measured[2], STEPS), STEPS)):
        figure = plot_fit(measured[2], fitted)
        assert {axes.get_title() for axes in figure.axes} == {COND, UNCOND}
        for axes in figure.axes:
            (points,), (line,) = axes.collections, axes.lines
            assert (len(points.get_offsets()), len(line.get_xdata())) == (2 * (STEPS - 1), count)


# Ranking


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(0, 11), st.sampled_from([0, 3]))
def test_each_skip_is_the_best_on_top_of_those_before(weights, most, nearby):
    """For a likeness that falls as more is skipped, and more so the more is skipped near by."""
    asked = []

    def measure(skipped):
        steps = {step for _, step in skipped}
        asked.append(steps)
        return 100 - sum(weights[step] * (1 + nearby * ((step - 1 in steps) + (step + 1 in steps))) for step in steps)

    slots, skipped = [(COND, step) for step in range(len(weights))], []
    rounds = list(rank_skips(measure, slots, most))
    assert len(asked) <= len(weights) * (1 + len(rounds))
    for number, done in enumerate(rounds, 1):
        most_alike = max(measure([*skipped, slot]) for slot in slots if slot not in skipped)
        assert done.likeness == measure(done.skipped) == most_alike
        skipped = list(done.skipped)
        assert len(skipped) == number
    assert len(rounds) == min(most, len(weights))


def test_most_forwards_are_not_measured_again():
    asked = []

    def measure(skipped):
        asked.append(skipped)
        return -sum(2.0**step for _, step in skipped)

    list(rank_skips(measure, [(COND, step) for step in range(40)], 26))
    assert len(asked) < 40 + 26 * 3, "of 40 + 39 + … + 15"


def test_ranks_are_those_of_the_order():
    ranks = ranks_of([(UNCOND, 3), (COND, 1), (UNCOND, 1)], [COND, UNCOND], 4)
    assert ranks == {COND: [None, 1, None, None], UNCOND: [None, 2, None, 0]}


def test_first_steps_cannot_be_skipped(pipe, two_experts):
    measure = SkipMeasure(pipe, PROMPTS[:1], 0, CALL)
    assert measure.slots() == [(owner, step) for step in range(1, STEPS) for owner in (COND, UNCOND)]
    assert SkipMeasure(pipe, PROMPTS[:1], 0, CALL | {"guidance_scale": 1.0}).owners() == [COND]
    measure = SkipMeasure(two_experts, PROMPTS[:1], 0, CALL)
    assert measure.owners() == [f"{expert}/{branch}" for expert in EXPERTS for branch in ("cond", "uncond")]
    steps = [[step for owner, step in measure.slots() if owner == f"{expert}/cond"] for expert in EXPERTS]
    left_out = set(range(STEPS)) - {step for own in steps for step in own}
    assert left_out == {0, max(steps[0], default=0) + 1}, "the first step of each has nothing to reuse"
    assert measure(measure.slots()[:1]) < 100


def test_the_measure_is_the_mean_over_prompts_whatever_the_batch(pipe):
    one, all_at_once = (SkipMeasure(pipe, PROMPTS, 3, CALL, batch_size=size) for size in (1, 3))
    assert one([]) == all_at_once([]) == 100
    skipped = [(UNCOND, 1), (COND, 3), (COND, 4)]
    assert one(skipped) == pytest.approx(all_at_once(skipped), abs=0.05)

    def latents():
        return pipe(PROMPTS[0], **CALL, generator=torch.Generator().manual_seed(3), output_type="latent").frames

    reference = latents()
    with cached(pipe, "schedule", STEPS, mask={"cond": [1, 1, 0, 1, 1], "uncond": [1] * STEPS}):
        error = (latents() - reference).square().mean()
    measured = SkipMeasure(pipe, PROMPTS[:1], 3, CALL)([(COND, 2)])
    assert measured == pytest.approx(-10 * error.log10().item(), abs=0.001), "in dB; sums have another order with SSE"


# Tuning


def alike(psnr):
    return Likeness(psnr, 1.0, 0.0, 0.0, psnr, 1.0, 0.0)


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
            yield alike(psnr), max(0.2, 1 - x / 2)

    return measure


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(20, 40))
def test_what_is_chosen_holds_with_confidence_and_is_the_fastest_of_those(seed, psnr):
    trials = list(tune(made_up(random.Random(seed), 40), psnr))
    found = best(trials)
    holding = [trial for trial in trials if trial.verdict == "holds"]
    assert all(trial.low >= psnr for trial in holding)
    assert (found.blocks if found else None) == min((trial.blocks for trial in holding), default=None)


def test_the_mean_on_other_videos_holds_nearly_always():
    noise, held = random.Random(1), 0
    for _ in range(50):
        found = best(list(tune(made_up(noise, 40, spread=6.0), 28, ["dicache"])))
        unseen = [found.psnr for found, _ in made_up(noise, 400, spread=6.0)(found.policy, found.options)]
        held += sum(unseen) / len(unseen) >= 28 - 0.5
    assert held >= 46


def test_the_threshold_comes_near_the_highest_that_holds():
    found = best(list(tune(made_up(random.Random(0), 10, spread=0.0), 30, ["dicache"])))
    highest = (45 - 30) / 30 * 1.2
    assert 0.9 * highest < found.options["rel_l1_thresh"] <= highest


def test_what_cannot_win_is_given_up_early():
    asked = []
    trials = list(tune(made_up(random.Random(0), 40, asked, spread=0.5), 30))
    videos = [(trial.verdict, asked.count((trial.policy, *trial.options.values()))) for trial in trials]
    fewest = {verdict: min(count for of, count in videos if of == verdict) for verdict, _ in videos}
    assert fewest == {"holds": 40, "too far": 4, "slower": 4}


def test_a_policy_that_cannot_work_here_is_left_out_and_nothing_may_hold():
    good = made_up(random.Random(0), 8)

    def measure(policy, options):
        if policy in ("teacache", "ranked"):
            raise PolicyUnfit("not calibrated")
        yield from good(policy, options)

    assert {trial.policy for trial in tune(measure, 30)} == set(TUNABLE) - {"teacache", "ranked"}
    assert best(list(tune(good, 99))) is None


def test_a_calibration_of_another_number_of_steps_is_a_policy_that_cannot_work_here(pipe):
    videos = Videos(pipe, PROMPTS[:1], 5, CALL)
    with pytest.raises(PolicyUnfit, match="has 1 entries, and the loop has"):
        list(videos("ranked", {"skip_rank": [None]}))
    assert pipe.cache is None


def test_videos_are_measured_against_their_own_uncached_ones(pipe):
    videos = Videos(pipe, PROMPTS[:2], 5, CALL, seeds=2)
    assert [(found.psnr, share) for found, share in videos("always", {})] == [(100.0, 1.0)] * 4
    some = [(found.psnr, share) for found, share in videos("schedule", {"mask": [1, 0, 1, 0, 1]})]
    assert len(some) == 4
    assert all(psnr < 100 and share == pytest.approx(0.6) for psnr, share in some)
    assert len({psnr for psnr, _ in some}) == 4, "every prompt and seed has a video of its own"
    assert pipe.cache is None
    reference = videos._make(3, "pt")
    pipe.enable_cache("schedule", 5, mask=[1, 0, 1, 0, 1])
    assert psnr_of(videos._make(3, "pt"), reference) == some[3][0]


def test_what_fails_in_a_video_is_said_and_is_no_policy_that_cannot_work_here(pipe, monkeypatch):
    videos = Videos(pipe, PROMPTS[:1], 5, CALL)
    assert list(tune(videos, 30, ["teacache"])) == [], "nobody has calibrated the model"
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        list(tune(videos, 30, ["seacache"]))
    assert pipe.cache is None


# The commands


@pytest.fixture
def command(folder, tmp_path):
    """Runs a command on a configuration of a cached run, and prompts beside it."""
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square \n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {folder}, device: cpu}}\n"
        f"sampling: {{height: 32, width: 32, num_frames: 5, num_inference_steps: {STEPS}, flow_shift: 5.0, seed: 3,\n"
        "  negative_prompt: black}\n"
        "video: {num_segments: 1}\n"
        "prompt_segments: [{segment: 0, prompt: a green circle}]\n"
        "cache: {policy: teacache, rel_l1_thresh: 0.3}\n"
    )

    def run(name, *arguments, prompts="prompts.txt", file="new.json"):
        files = ["--prompts", tmp_path / prompts, *(["--file", tmp_path / file] if name == "calibrate" else [])]
        return main([*map(str, (name, "--config", config, *files, *arguments))])

    return run


def test_calibrate_writes_what_the_pipeline_then_picks_up(command, tmp_path, folder, pipe, capsys):
    file = tmp_path / "new.json"
    assert command("calibrate", "--policy", "teacache", "--use-ret-steps") == 0
    assert read_calibration(file)["teacache"]["use_ret_steps"] is True
    assert command("calibrate", "--policy", "teacache") == 0
    assert command("calibrate", "--policy", "magcache", "--set", "sampling.num_inference_steps=4") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(file)
    drawn = find_spec("matplotlib") is not None
    plots = [tmp_path / f"new.{policy}.png" for policy in ("teacache", "magcache") if drawn]
    assert set(printed) - {str(file)} == set(map(str, plots))
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)

    content = json.loads(file.read_text())
    said = content["measured"]["teacache"]
    assert (said["prompts"], said["seed"], said["num_inference_steps"]) == (2, 3, STEPS)
    assert content["measured"]["magcache"]["num_inference_steps"] == 4
    assert {len(ratios) for ratios in content["policies"]["magcache"]["mag_ratios"].values()} == {4}

    pipe.scheduler = with_flow_shift(pipe.scheduler, 5.0)
    expected = fit_teacache(observe(pipe, PROMPTS[:2], 3, {**CALL, "negative_prompt": "black"}), False)
    assert content["policies"]["teacache"] == expected
    file.rename(folder / FILE_NAME)
    pipe.enable_cache("teacache", STEPS)
    assert pipe.cache.policy.coefficients == {owner: tuple(c) for owner, c in expected["coefficients"].items()}


def test_calibrate_ranks_and_the_pipeline_picks_it_up(command, folder, tmp_path, pipe, capsys):
    assert command("calibrate", "--policy", "ranked", "--batch-size", "2") == 0
    assert "6 of 10 forwards skipped" in capsys.readouterr().err
    ranks = json.loads((tmp_path / "new.json").read_text())["policies"]["ranked"]["skip_rank"]
    assert sorted(rank for ranked in ranks.values() for rank in ranked if rank is not None) == list(range(6))
    (tmp_path / "new.json").rename(folder / FILE_NAME)
    for speedup, computed in ((2.0, 5), (1.25, 8), (10.0, 4)):
        with cached(pipe, "ranked", STEPS, target_speedup=speedup) as cache:
            assert sum(map(sum, cache.plan().values())) == computed
    with pytest.raises(ValueError, match=r"skip_rank\['transformer/cond'\] has 5 entries, and the loop has 6 steps"):
        pipe.enable_cache("ranked", 6, skips=2).plan()


def test_tune_prints_the_section_for_a_configuration(command, capsys):
    assert command("tune", "--psnr", "40", "--policies", "seacache") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("cache: {policy: ")
    assert "dB (at least" in printed.err


def test_tune_searches_and_continues_from_its_file(command, tmp_path, capsys, folder, pipe):
    (tmp_path / "five.txt").write_text("\n".join(f"a red circle {number}" for number in range(5)))
    arguments = ("tune", "--psnr", "25", "--policies", "search", "--budget", "60", "--file", tmp_path / "kept.jsonl")
    assert command(*arguments, prompts="five.txt") == 0
    first = capsys.readouterr()
    assert "videos for the errors of single reuses" in first.err
    assert "as many other prompts have a mean of at least " in first.err
    chosen = yaml.safe_load(first.out)["cache"]
    assert chosen.pop("policy") == "schedule"
    assert command(*arguments, prompts="five.txt") == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "\n0 videos were made\n" in again.err
    with cached(pipe, "schedule", STEPS, **chosen) as cache:
        pipe(PROMPTS[0], output_type="latent", **CALL)
        assert blocks_share(cache) < 1
    assert command(*arguments, "--seeds", "2", prompts="five.txt") == 2
    assert "has measurements of another model, prompts or sampling" in capsys.readouterr().err


def test_tune_says_that_nothing_holds(command, capsys, monkeypatch):
    monkeypatch.setitem(TUNABLE, "seacache", ("threshold", 2.9, 3.0))
    assert command("tune", "--psnr", "99.9", "--policies", "seacache") == 1
    assert "no setting of seacache keeps 99.9 dB" in capsys.readouterr().err


TEACACHE = ("calibrate", "--policy", "teacache")


@pytest.mark.parametrize(
    ("arguments", "files", "words"),
    [
        (TEACACHE, {"prompts": "none.txt"}, "none.txt cannot be read"),
        (TEACACHE, {"prompts": "empty.txt"}, "holds no prompt; it must have one per line"),
        (TEACACHE, {"prompts": "bytes.txt"}, "bytes.txt cannot be read"),
        (TEACACHE, {"file": "none/new.json"}, "is not a folder"),
        (TEACACHE, {"file": "empty.txt"}, "empty.txt is not a calibration"),
        ((*TEACACHE, "--set", "sampling.num_inference_steps=0"), {}, "num_inference_steps is 0"),
        ((*TEACACHE, "--set", "sampling.num_inference_steps=1"), {}, "made one step a call"),
        ((*TEACACHE, "--set", "sampling.height=40"), {}, "sampling.height is 40"),
        ((*TEACACHE, "--set", "model.path=nobody"), {}, "nobody"),
        (("calibrate", "--policy", "ranked", "--batch-size", "0"), {}, "--batch-size is 0"),
        (("tune", "--psnr", "0"), {}, "--psnr is 0; it must be above 0"),
        (("tune", "--psnr", "nan"), {}, "--psnr is nan"),
        (("tune", "--psnr", "30", "--seeds", "0"), {}, "--seeds is 0"),
        (("tune", "--psnr", "30", "--policies", "dicache,best"), {}, "--policies has best; it may have ranked, lemica"),
        (("tune", "--psnr", "30"), {"prompts": "one.txt"}, "one video is not enough to generalize from"),
        (("tune", "--psnr", "30", "--budget", "-1"), {}, "--budget is -1; it must be a whole number from 0"),
        (("tune", "--psnr", "30", "--policies", "search"), {}, "--prompts has 2; search takes at least 4"),
        (("tune", "--psnr", "30", "--file", "/none/x.jsonl"), {}, "--file: "),
    ],
    ids=str,
)
def test_what_cannot_be_measured_ends_with_code_2_and_a_sentence(command, arguments, files, words, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    (tmp_path / "one.txt").write_text("a red circle\n")
    before = sorted(tmp_path.iterdir())
    assert command(*arguments, **files) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("edit-ray: ")
    assert words in line
    assert sorted(tmp_path.iterdir()) == before
