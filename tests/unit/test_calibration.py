"""What a policy knows of a model: stored in the model's folder, used where no option is given; and target speedups."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.policies import make_policy
from edit_ray.engine.calibration import (
    FILE_NAME,
    calibrated_options,
    read_calibration,
    threshold_for,
    write_calibration,
)
from edit_ray.testing import save_random_wan
from tests import calls

STEPS = 6
latents = partial(calls.latents, seed=5, num_inference_steps=STEPS, guidance_scale=4.0)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    chosen = threshold_for("threshold", speedup, computed_share)
    assert abs(1 / computed_share(chosen) - speedup) == pytest.approx(min(reachable))


FITTED = {"coefficients": [1, 2], "use_ret_steps": True}
MEASURED = {"mag_ratios": [0.9]}
INNER = {"inner": make_policy("always", {})}


@pytest.mark.parametrize(
    ("policy", "options", "filled"),
    [
        ("teacache", {}, FITTED),
        ("teacache", {"rel_l1_thresh": 0.3}, {**FITTED, "rel_l1_thresh": 0.3}),
        *(("teacache", only, only) for only in ({"coefficients": [3]}, {"wan_variant": "x"}, {"use_ret_steps": False})),
        ("magcache", {"threshold": 0.1}, {**MEASURED, "threshold": 0.1}),
        ("magcache", {"mag_ratios": [1.1]}, {"mag_ratios": [1.1]}),
        ("fbcache", {"rel_l1_thresh": 0.1}, {"rel_l1_thresh": 0.1}),
        ("warmstart_reuse", {"warm_steps": 1}, {**FITTED, "warm_steps": 1}),
        ("warmstart_reuse", {"inner": "magcache"}, {"inner": "magcache", **MEASURED}),
        pytest.param("warmstart_reuse", INNER, INNER, id="an inner policy that is made"),
    ],
    ids=lambda value: "an inner policy" if value is INNER else str(value),
)
def test_what_is_given_wins_over_what_was_measured(tmp_path, policy, options, filled):
    """Coefficients fit one signal only, so one given option of them excludes the measured ones."""
    write_calibration(tmp_path / FILE_NAME, "teacache", FITTED, {})
    write_calibration(tmp_path / FILE_NAME, "magcache", MEASURED, {})
    assert calibrated_options(tmp_path, policy, options) == filled
    (tmp_path / "file").touch()
    for nowhere in (None, tmp_path / "nothing", tmp_path / "file"):
        assert calibrated_options(nowhere, policy, options) == options


def test_a_calibration_keeps_what_it_has_of_other_policies(tmp_path):
    file = tmp_path / FILE_NAME
    assert read_calibration(file) == {}
    file.write_text('{"schema": 1, "policies": {"schedule": {"mask": [true]}}}')  # by hand
    for number, (policy, options) in enumerate([("teacache", {"a": 1}), ("magcache", MEASURED), ("teacache", FITTED)]):
        write_calibration(file, policy, options, {"prompts": number})
    assert read_calibration(file) == {"schedule": {"mask": [True]}, "teacache": FITTED, "magcache": MEASURED}
    assert json.loads(file.read_text())["measured"] == {"teacache": {"prompts": 2}, "magcache": {"prompts": 1}}


BROKEN = [
    *(b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"policies": {}}', b'{"schema": 2, "policies": {}}'),
    *(b'{"schema": 1}', b'{"schema": 1, "policies": []}', b'{"schema": 1, "policies": {"teacache": 3}}'),
]


@pytest.mark.parametrize("content", [*BROKEN, None], ids=lambda content: repr(content)[:50])
def test_what_is_no_calibration_is_refused_and_kept(tmp_path, content):
    file = tmp_path / FILE_NAME
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a calibration"):
        calibrated_options(tmp_path, "teacache", {})
    with pytest.raises(ValueError, match=f"{FILE_NAME} is not a calibration"):
        write_calibration(file, "teacache", {"coefficients": [1]}, {})
    assert content is None or file.read_bytes() == content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=2)


@pytest.fixture
def pipe(folder):
    yield calls.load(folder)
    (folder / FILE_NAME).unlink(missing_ok=True)


LINE = {"coefficients": [1.0, 0.0]}


@pytest.fixture
def calibrated(pipe, folder):
    """The model with a calibration in its folder."""
    write_calibration(folder / FILE_NAME, "teacache", LINE, {})
    write_calibration(folder / FILE_NAME, "magcache", {"mag_ratios": [1.0, 0.9, 0.97, 0.95, 0.99, 0.98]}, {})
    return pipe


def test_a_pipeline_picks_up_its_models_calibration(calibrated):
    given = partial(calls.cached, calibrated, "teacache", STEPS, rel_l1_thresh=1.5)
    with given() as cache:
        own = latents(calibrated)
        assert 0 < cache.stats["cond"].skipped < STEPS
    with given(**LINE):
        assert torch.equal(latents(calibrated), own)
    with given(coefficients=[0.0]) as cache:
        latents(calibrated)
        assert cache.record.mask() == [True, *[False] * (STEPS - 2), True], "what is given wins"


def test_without_its_calibration_the_model_needs_options(pipe, folder):
    with pytest.raises(ValueError, match=r"either wan_variant= .* or coefficients="):
        pipe.enable_cache("teacache", STEPS)
    (folder / FILE_NAME).write_text("{}")
    with pytest.raises(ValueError, match="is not a calibration"):
        pipe.enable_cache("teacache", STEPS)
    assert pipe.cache is None


def share(pipe, policy, **options):
    """Of all forwards, those that compute."""
    with calls.cached(pipe, policy, STEPS, **options) as cache:
        plan = cache.plan()
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
    assert share(calibrated, "teacache", granularity="per_block", target_speedup=2.0) == 0.5


def test_a_target_that_means_nothing_is_refused_and_leaves_no_cache(calibrated):
    for policy, options, words in (
        ("fbcache", {}, "needs a policy .*: teacache, magcache, ranked, lemica; the policy is 'fb"),
        ("schedule", {"mask": [True] * STEPS}, "needs a policy whose mask"),
        ("teacache", {"rel_l1_thresh": 0.1}, "target_speedup and rel_l1_thresh were both given"),
        ("magcache", {"threshold": 0.1}, "target_speedup and threshold were both given"),
        (make_policy("always", {}), {}, "needs the name of a policy"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrated.enable_cache(policy, STEPS, target_speedup=2.0, **options)
        assert calibrated.cache is None
