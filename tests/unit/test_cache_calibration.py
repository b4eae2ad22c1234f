"""What a policy knows of a model: measured as it is, fitted, kept in the model's folder, picked up where it lacks."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray import EditWanPipeline
from edit_ray.cache import relative_l1
from edit_ray.cache.policies import make_policy
from edit_ray.cli import main
from edit_ray.engine.calibrate import Measured, fit_magcache, fit_teacache, observe, plot_fit
from edit_ray.engine.calibration import FILE_NAME, calibrated_options, read_calibration, write_calibration
from edit_ray.engine.loading import with_flow_shift
from edit_ray.engine.targets import check_target, threshold_for
from edit_ray.testing import save_random_wan

STEPS = 6
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 4.0}
OWNERS = {"transformer/cond", "transformer/uncond"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=3)


@pytest.fixture(scope="module")
def loaded(folder):
    pipe = EditWanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded, folder):
    noise_scheduler = loaded.scheduler
    yield loaded
    loaded.disable_cache()
    loaded.scheduler = noise_scheduler
    (folder / FILE_NAME).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def measured(loaded):
    """Two prompts by themselves, and both together."""
    prompts = ["a red circle", "a blue square"]
    return *(observe(loaded, [prompt], 3 + i, CALL) for i, prompt in enumerate(prompts)), observe(
        loaded, prompts, 3, CALL
    )


# Thresholds


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 10**7), max_size=8, unique=True),
    st.lists(st.integers(1, 30), min_size=9, max_size=9),
    st.floats(1.01, 40),
)
def test_a_threshold_comes_as_near_to_the_speedup_as_any_can(jumps, counts, speedup):
    jumps, counts = [jump / 1e6 for jump in sorted(jumps)], [30, *sorted(counts, reverse=True)]

    def computed_share(threshold):
        """Of 30 forwards: all of them at 0, and fewer from each jump on."""
        return counts[sum(threshold > jump for jump in jumps)] / 30

    reachable = [abs(30 / count - speedup) for count in counts[: len(jumps) + 1]]
    chosen = threshold_for(speedup, computed_share)
    assert abs(1 / computed_share(chosen) - speedup) == pytest.approx(min(reachable))


def test_targets_need_a_threshold_that_nobody_gave():
    ratios = {"mag_ratios": [1.0]}
    check_target("magcache", make_policy("magcache", ratios), ratios)
    with pytest.raises(
        ValueError, match=r"target_speedup needs a policy .*: teacache, magcache, ranked; the policy is 'fb"
    ):
        check_target("fbcache", make_policy("fbcache", {}), {})
    for name, option, given_ in (
        ("teacache", "rel_l1_thresh", {"coefficients": [1.0], "rel_l1_thresh": 0.1}),
        ("magcache", "threshold", {**ratios, "threshold": 0.1}),
    ):
        with pytest.raises(ValueError, match=f"target_speedup and {option} were both given"):
            check_target(name, make_policy(name, given_), given_)


# Files


def test_what_is_given_wins_over_what_was_measured(tmp_path):
    write_calibration(tmp_path / FILE_NAME, "teacache", {"coefficients": [1, 2], "use_ret_steps": True}, {})
    write_calibration(tmp_path / FILE_NAME, "magcache", {"mag_ratios": [0.9]}, {})
    filled = {"coefficients": [1, 2], "use_ret_steps": True}
    assert calibrated_options(tmp_path, "teacache", {}) == filled
    assert calibrated_options(tmp_path, "teacache", {"rel_l1_thresh": 0.3}) == {**filled, "rel_l1_thresh": 0.3}
    for given_ in ({"coefficients": [3]}, {"wan_variant": "t2v-14B"}, {"use_ret_steps": False}):
        assert calibrated_options(tmp_path, "teacache", given_) == given_, "coefficients fit one signal only"
    assert calibrated_options(tmp_path, "magcache", {"threshold": 0.1}) == {"mag_ratios": [0.9], "threshold": 0.1}
    assert calibrated_options(tmp_path, "magcache", {"mag_ratios": [1.1]}) == {"mag_ratios": [1.1]}
    assert calibrated_options(tmp_path, "fbcache", {"rel_l1_thresh": 0.1}) == {"rel_l1_thresh": 0.1}


def test_warm_start_takes_the_options_of_its_inner_policy(tmp_path):
    write_calibration(tmp_path / FILE_NAME, "teacache", {"coefficients": [1, 2]}, {})
    write_calibration(tmp_path / FILE_NAME, "magcache", {"mag_ratios": [0.9]}, {})
    assert calibrated_options(tmp_path, "warmstart_reuse", {"warm_steps": 1}) == {
        "coefficients": [1, 2],
        "warm_steps": 1,
    }
    by_name = {"inner": "magcache"}
    assert calibrated_options(tmp_path, "warmstart_reuse", by_name) == {"inner": "magcache", "mag_ratios": [0.9]}
    made = {"inner": make_policy("always", {})}
    assert calibrated_options(tmp_path, "warmstart_reuse", made) == made


def test_without_a_calibration_nothing_is_filled_in(tmp_path):
    (tmp_path / "file").touch()
    for nowhere in (None, tmp_path, tmp_path / "nothing", tmp_path / "file"):
        assert calibrated_options(nowhere, "teacache", {"rel_l1_thresh": 0.1}) == {"rel_l1_thresh": 0.1}


def test_a_calibration_keeps_what_it_has_of_other_policies(tmp_path):
    file = tmp_path / FILE_NAME
    assert read_calibration(file) == {}
    write_calibration(file, "teacache", {"coefficients": [1]}, {"prompts": 1})
    write_calibration(file, "magcache", {"mag_ratios": [1.0]}, {"prompts": 2})
    write_calibration(file, "teacache", {"coefficients": [2]}, {"prompts": 3})
    assert read_calibration(file) == {"teacache": {"coefficients": [2]}, "magcache": {"mag_ratios": [1.0]}}
    assert json.loads(file.read_text())["measured"] == {"teacache": {"prompts": 3}, "magcache": {"prompts": 2}}


def test_a_calibration_that_a_hand_has_written_may_be_added_to(tmp_path):
    file = tmp_path / FILE_NAME
    file.write_text('{"schema": 1, "policies": {"schedule": {"mask": [true]}}}')
    write_calibration(file, "magcache", {"mag_ratios": [1.0]}, {})
    assert read_calibration(file) == {"schedule": {"mask": [True]}, "magcache": {"mag_ratios": [1.0]}}


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff",
    b"[" * 100_000,
    b'{"policies": {}}',
    b'{"schema": 2, "policies": {}}',
    b'{"schema": 1}',
    b'{"schema": 1, "policies": []}',
    b'{"schema": 1, "policies": {"teacache": 3}}',
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: repr(content[:50]))
def test_what_is_no_calibration_is_refused_and_kept(tmp_path, content, loaded):
    file = tmp_path / FILE_NAME
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is no calibration"):
        calibrated_options(tmp_path, "teacache", {})
    with pytest.raises(ValueError, match=f"{FILE_NAME} is no calibration"):
        write_calibration(file, "teacache", {"coefficients": [1]}, {})
    assert file.read_bytes() == content


def test_a_folder_is_no_calibration(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ValueError, match="is no calibration"):
        read_calibration(tmp_path / FILE_NAME)


# Measuring and fitting


def test_what_is_measured_is_what_the_model_does(loaded, measured):
    """Read from the outside, at the model's own modules, over one call."""
    signals, hidden, residuals = [], [], []
    model = loaded.transformer
    hooks = [
        model.condition_embedder.time_embedder.register_forward_hook(lambda m, args, out: signals.append(out)),
        model.blocks[0].register_forward_pre_hook(lambda m, args: hidden.append(args[0])),
        model.blocks[-1].register_forward_hook(lambda m, args, out: residuals.append(out - hidden[-1])),
    ]
    loaded("a red circle", generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
    for hook in hooks:
        hook.remove()
    assert len(signals) == len(residuals) == 2 * STEPS  # cond and uncond take turns
    for owner, first in (("transformer/cond", 0), ("transformer/uncond", 1)):
        seen = measured[0][owner]
        own = residuals[first::2]
        assert seen.signal == pytest.approx([relative_l1(b, a) for a, b in pairwise(signals[first::2])], rel=1e-4)
        assert seen.change == pytest.approx([relative_l1(b, a) for a, b in pairwise(own)], rel=1e-4)
        ratios = [(b.norm(dim=-1) / a.norm(dim=-1)).mean().item() for a, b in pairwise(own)]
        assert seen.ratios == [pytest.approx(dict(enumerate(ratios, start=1)), rel=1e-4)]


def test_prompts_are_measured_one_after_the_other_with_seeds_of_their_own(measured):
    one, two, both = measured
    assert set(both) == OWNERS
    for owner, seen in both.items():
        assert seen == Measured(
            *(getattr(one[owner], f) + getattr(two[owner], f) for f in ("signal", "change", "ratios"))
        )
        assert one[owner].signal == two[owner].signal, "timesteps alone decide on it"
        assert one[owner].change != two[owner].change


def test_observing_leaves_the_model_uncached_even_if_it_fails(pipe):
    with pytest.raises(ValueError, match="divisible by 16"):
        observe(pipe, ["a red circle"], 0, {**CALL, "height": 33})
    assert pipe.cache is None
    observe(pipe, [], 0, CALL)
    assert pipe.cache is None
    pipe.enable_cache("always", STEPS)
    with pytest.raises(ValueError, match="enabled already"):
        observe(pipe, ["a red circle"], 0, CALL)


def test_experts_are_measured_apart(tmp_path):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path, two_experts=True, boundary_ratio=0.8))
    pipe.set_progress_bar_config(disable=True)
    measured = observe(pipe, ["a red circle"], 0, CALL)
    assert set(measured) == OWNERS | {owner.replace("transformer", "transformer_2") for owner in OWNERS}
    high, low = (list(measured[f"{expert}/cond"].ratios[0]) for expert in ("transformer", "transformer_2"))
    assert high == list(range(1, len(high) + 1))
    assert low == list(range(len(high) + 2, STEPS))  # each expert's first step has nothing before it
    ratios = fit_magcache(measured, STEPS)["mag_ratios"]
    assert {len(of_owner) for of_owner in ratios.values()} == {STEPS}
    assert ratios["transformer_2/cond"][: len(high) + 2] == [1.0] * (len(high) + 2)
    pipe.enable_cache("teacache", STEPS, **fit_teacache(measured, False))
    pipe.disable_cache()


def test_signals_are_those_that_teacache_will_see(pipe):
    for use_ret_steps in (False, True):
        measured = observe(pipe, ["a red circle"], 3, CALL, use_ret_steps=use_ret_steps)
        options = fit_teacache(measured, use_ret_steps)
        assert options["use_ret_steps"] is use_ret_steps
        assert set(options["coefficients"]) == OWNERS
        pipe.enable_cache("teacache", STEPS, rel_l1_thresh=1e-9, **options)
        pipe("a red circle", output_type="latent", **CALL)
        seen = [decision.signal for decision in pipe.cache.record if decision.branch == "cond"]
        assert seen == [None, *measured["transformer/cond"].signal]
        pipe.disable_cache()


def test_a_polynomial_through_all_points_reproduces_them(measured):
    """One call of six steps has five changes, which determine a polynomial of degree 4."""
    for owner, seen in measured[0].items():
        coefficients = fit_teacache(measured[0], False)["coefficients"][owner]
        assert len(coefficients) == 5
        assert np.polyval(coefficients, seen.signal) == pytest.approx(seen.change, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 2), min_size=5, max_size=5), st.integers(5, 30))
def test_a_fit_finds_the_polynomial_that_made_the_data(coefficients, count):
    signal = [float(x) for x in np.linspace(0.1, 1.5, count)]
    change = [float(np.polyval(coefficients, x)) for x in signal]
    fitted = fit_teacache({"transformer/cond": Measured(signal, change)}, False)["coefficients"]
    assert np.polyval(fitted["transformer/cond"], signal) == pytest.approx(change, rel=1e-6)
    assert fitted["transformer/cond"] == pytest.approx(coefficients, rel=1e-2, abs=1e-2)


def test_few_points_give_a_lower_degree():
    def fitted(signal, change):
        return fit_teacache({"transformer/cond": Measured(signal, change)}, False)["coefficients"]["transformer/cond"]

    assert fitted([0.5], [0.2]) == pytest.approx([0.2])
    assert fitted([0.5, 0.5], [0.2, 0.2]) == pytest.approx([0.2])
    assert fitted([0.0, 1.0, 1.0], [1.0, 3.0, 3.0]) == pytest.approx([2.0, 1.0])
    with pytest.raises(ValueError, match="transformer/cond made one step a call"):
        fitted([], [])


def test_small_changes_count_as_much_as_large_ones():
    """Weighted by 1 / change: at one signal, the fit of 1 and 3 is (1/1 + 1/3) / (1/1² + 1/3²)."""
    seen = Measured([0.5, 0.5], [1.0, 3.0])
    assert fit_teacache({"transformer/cond": seen}, False)["coefficients"]["transformer/cond"] == pytest.approx([1.2])


def test_ratios_are_the_mean_over_calls():
    seen = Measured(ratios=[{1: 0.8, 2: 0.6}, {1: 0.9, 3: 0.5}, {}])
    fitted = fit_magcache({"transformer/cond": seen}, 5)["mag_ratios"]["transformer/cond"]
    assert fitted == pytest.approx([1.0, 0.85, 0.6, 0.5, 1.0])


def test_plots_show_what_was_measured_and_what_was_fitted(measured):
    pytest.importorskip("matplotlib")
    for fitted in (fit_teacache(measured[2], False), fit_magcache(measured[2], STEPS)):
        figure = plot_fit(measured[2], fitted)
        assert {axes.get_title() for axes in figure.axes} == OWNERS
        for axes in figure.axes:
            seen = measured[2][axes.get_title()]
            (points,), (line,) = axes.collections, axes.lines
            if "coefficients" in fitted:
                assert np.array_equal(points.get_offsets(), np.column_stack([seen.signal, seen.change]))
                x, y = line.get_data()
                assert np.polyval(fitted["coefficients"][axes.get_title()], x) == pytest.approx(y)
            else:
                assert len(points.get_offsets()) == 2 * (STEPS - 1)
                assert list(line.get_ydata()) == fitted["mag_ratios"][axes.get_title()]


# The model's own calibration


@pytest.fixture
def calibrated(pipe, folder, measured):
    """The model with a calibration in its folder."""
    file = folder / FILE_NAME
    write_calibration(file, "teacache", fit_teacache(measured[2], False), {})
    write_calibration(file, "magcache", fit_magcache(measured[2], STEPS), {})
    return pipe


def latents(pipe):
    return pipe("a red circle", generator=torch.Generator().manual_seed(5), output_type="latent", **CALL).frames


def test_a_pipeline_picks_up_its_models_calibration(calibrated, measured):
    calibrated.enable_cache("teacache", STEPS, rel_l1_thresh=0.5)
    own = latents(calibrated)
    assert 0 < calibrated.cache.stats["cond"].skipped < STEPS
    calibrated.disable_cache()
    calibrated.enable_cache("teacache", STEPS, rel_l1_thresh=0.5, **fit_teacache(measured[2], False))
    assert torch.equal(latents(calibrated), own)
    calibrated.disable_cache()
    calibrated.enable_cache("teacache", STEPS, rel_l1_thresh=0.5, coefficients=[0.0])
    latents(calibrated)
    assert calibrated.cache.record.mask() == [True, *[False] * (STEPS - 2), True], "what is given wins"


def test_without_its_calibration_the_model_needs_options(pipe, folder):
    with pytest.raises(ValueError, match=r"either wan_variant= .* or coefficients="):
        pipe.enable_cache("teacache", STEPS)
    (folder / FILE_NAME).write_text("{}")
    with pytest.raises(ValueError, match="is no calibration"):
        pipe.enable_cache("teacache", STEPS)
    assert pipe.cache is None


# Target speedups


def share(pipe, policy, **options):
    """Of all forwards, those that compute."""
    pipe.enable_cache(policy, STEPS, **options)
    plan = pipe.cache.plan()
    pipe.disable_cache()
    return sum(map(sum, plan.values())) / sum(map(len, plan.values()))


@pytest.mark.parametrize(("policy", "option"), [("teacache", "rel_l1_thresh"), ("magcache", "threshold")])
def test_a_target_is_met_as_nearly_as_any_threshold_can(calibrated, policy, option):
    speedups = {1 / share(calibrated, policy, **{option: threshold}) for threshold in np.geomspace(1e-3, 20, 25)}
    assert len(speedups) > 2
    calibrated.enable_cache(policy, STEPS, target_speedup=1.7)
    latents(calibrated)
    (speedup,) = (1 / (1 - count.skip_rate) for count in calibrated.cache.record.counts().values())
    assert abs(speedup - 1.7) <= min(abs(reached - 1.7) for reached in speedups) + 1e-9


def test_half_of_the_forwards_are_half(calibrated):
    calibrated.enable_cache("teacache", STEPS, "per_block", target_speedup=2.0)
    latents(calibrated)
    assert {branch: count.skip_rate for branch, count in calibrated.cache.stats.items()} == {"cond": 0.5, "uncond": 0.5}


def test_a_target_that_means_nothing_is_refused_and_leaves_no_cache(calibrated):
    for policy, options, words in (
        ("fbcache", {}, "needs a policy whose mask"),
        ("schedule", {"mask": [True] * STEPS}, "needs a policy whose mask"),
        ("teacache", {"rel_l1_thresh": 0.1}, "were both given"),
        (make_policy("always", {}), {}, "needs the name of a policy"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrated.enable_cache(policy, STEPS, target_speedup=2.0, **options)
        assert calibrated.cache is None


# The command

CONFIG = """\
model: {{path: {path}, device: cpu}}
sampling:
  {{height: 32, width: 32, num_frames: 5, num_inference_steps: {steps}, flow_shift: 5.0, seed: 3,
    negative_prompt: black}}
video: {{num_segments: 1}}
prompt_segments: [{{segment: 0, prompt: a green circle}}]
cache: {{policy: teacache, rel_l1_thresh: 0.3}}
"""


@pytest.fixture
def config(folder, tmp_path):
    """A configuration of a cached run; and a file of prompts beside it."""
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square \n")
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(path=folder, steps=STEPS))
    return path


def calibrate(config, policy="teacache", *others, prompts="prompts.txt", file="new.json"):
    arguments = ["--config", config, "--policy", policy, "--prompts", config.parent / prompts]
    return main(["calibrate", *map(str, [*arguments, "--file", config.parent / file, *others])])


def test_the_command_writes_what_the_pipeline_then_picks_up(config, folder, pipe, capsys):
    file = config.parent / "new.json"
    plots = [config.parent / f"new.{policy}.png" for policy in ("teacache", "magcache")]
    assert calibrate(config) == 0
    assert calibrate(config, "magcache", "--set", "sampling.num_inference_steps=4") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(file)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        plots = []
    assert [line for line in printed if line != str(file)] == [str(plot) for plot in plots]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)

    content = json.loads(file.read_text())
    said = content["measured"]["teacache"]
    assert (said["prompts"], said["seed"], said["num_inference_steps"]) == (2, 3, STEPS)
    assert content["measured"]["magcache"]["num_inference_steps"] == 4
    assert {len(ratios) for ratios in content["policies"]["magcache"]["mag_ratios"].values()} == {4}

    pipe.scheduler = with_flow_shift(pipe.scheduler, 5.0)
    call = {**CALL, "negative_prompt": "black"}
    expected = fit_teacache(observe(pipe, ["a red circle", "a blue square"], 3, call), False)
    assert content["policies"]["teacache"] == expected
    file.rename(folder / FILE_NAME)
    pipe.enable_cache("teacache", STEPS)
    assert pipe.cache.policy.coefficients == {owner: tuple(c) for owner, c in expected["coefficients"].items()}


def test_the_command_can_watch_the_other_signal(config):
    assert calibrate(config, "teacache", "--use-ret-steps") == 0
    assert read_calibration(config.parent / "new.json")["teacache"]["use_ret_steps"] is True


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"prompts": "none.txt"}, "none.txt cannot be read"),
        ({"prompts": "empty.txt"}, "holds no prompt; it must have one per line"),
        ({"prompts": "bytes.txt"}, "bytes.txt cannot be read"),
        ({"file": "none/new.json"}, "is not a folder"),
        ({"file": "empty.txt"}, "empty.txt is no calibration"),
        ({"set": "sampling.num_inference_steps=0"}, "num_inference_steps is 0"),
        ({"set": "sampling.num_inference_steps=1"}, "made one step a call"),
        ({"set": "sampling.height=40"}, "sampling.height is 40"),
        ({"set": "model.path=nobody"}, "nobody"),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_ends_with_code_2_and_a_sentence(config, given_, words, capsys):
    (config.parent / "empty.txt").write_text("\n \n")
    (config.parent / "bytes.txt").write_bytes(b"\xff")
    override = given_.pop("set", None)
    before = sorted(config.parent.iterdir())
    assert calibrate(config, "teacache", *(["--set", override] if override else []), **given_) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("edit-ray: ")
    assert words in line
    assert sorted(config.parent.iterdir()) == before
