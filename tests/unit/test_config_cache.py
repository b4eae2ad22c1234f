"""The cache section: every mistake in it is one sentence with its place, found without torch and without weights."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES, Always
from edit_ray.client import LongVideoClient
from edit_ray.config import check_config, load_config
from edit_ray.engine.calibration import FILE_NAME, write_calibration
from edit_ray.errors import ConfigError
from tests.unit.test_config import SHIPPED, check_written
from tests.unit.test_layers import in_fresh_python

FILE = """\
model: {{path: {model}, device: cpu}}
sampling: {{height: 32, width: 32, num_frames: 5, num_inference_steps: 4}}
video: {{num_segments: 1}}
prompt_segments: [{{segment: 0, prompt: a red circle}}]
cache:
{section}
"""


@pytest.fixture
def model(model_without_weights: Path) -> Path:
    return model_without_weights


def write(model: Path, folder: Path, *section: str) -> Path:
    """A configuration whose cache section, from line 6 on, is `section`."""
    path = folder / "run.yaml"
    path.write_text(FILE.format(model=model, section="\n".join(f"  {line}" for line in section)))
    return path


def problems_of(path: Path, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return tuple(problem.removeprefix(str(path)) for problem in caught.value.problems)


# The section, the key in whose line the mistake is, and the sentence behind that key, `…` for what may be between.
BAD: list[tuple[str, str, str]] = [
    ("policy: tea", "policy", " is 'tea'; it must be one of none, always, dicache, dmd"),
    ("policy: ''", "policy", " is ''; it must be text of 1 to 200 characters"),
    ("policy: [teacache]", "policy", " is a list of 1; it must be text"),
    ("rel_l1_thresh: 0.1 | policy: ~", "policy", " is empty (null); it must be text"),
    # reuse between segments
    ("policy: warmstart_reuse | wan_variant: t2v-14B", "policy", "reuse_window is 0 and …'warmstart_reuse'"),
    ("policy: always | reuse_window: 2", "reuse_window", " is 2 and cache.policy 'always'; for segments that reuse"),
    ("policy: none | reuse_window: 2", "reuse_window", " is an option of no policy"),
    ("reuse_window: -1 | policy: always", "reuse_window", " is -1; it must be"),
    ("policy: warmstart_reuse | inner: always | reuse_window: 2 | align: last", "align", " is 'last'…must be 'step'"),
    # options of no policy
    ("rel_l1_thresh: 0.1", "rel_l1_thresh", " is an option of no policy: cache.policy is none"),
    ("policy: none | threshold: 0.1", "threshold", " is an option of no policy"),
    ("policy: none | target_speedup: 2", "target_speedup", " is an option of no policy"),
    # options that the policy has not
    ("policy: teacache | wan_variant: t2v-14B | rel_thresh: 0.1", "rel_thresh", "has no option rel_thresh; it takes"),
    ("policy: fbcache | x: 1 | cache: 2", "x", "'fbcache' has no option x, cache; it takes rel_l1_thresh"),
    ("policy: always | granularty: stack", "granularty", "'always' has no option granularty; it takes none"),
    ("policy: fbcache | mask: [true]", "mask", "'fbcache' has no option mask; it takes rel_l1_thresh"),
    # what is missing
    ("policy: teacache | rel_l1_thresh: 0.1", "policy", "teacache takes either wan_variant= (one of t2v-1.3B…neither"),
    ("granularity: stack | policy: magcache", "policy", "magcache needs mag_ratios=, measured on the model at hand"),
    ("policy: schedule", "policy", "'schedule' needs the option mask; it takes mask, forecast"),
    # values
    (
        "policy: teacache | wan_variant: t2v-2B",
        "wan_variant",
        " is 't2v-2B'; it must be one of t2v-1.3B, t2v-14B, i2v-480p",
    ),
    ("policy: teacache | wan_variant: t2v-14B | coefficients: [1, 0]", "wan_variant", "was given both"),
    ("policy: fbcache | rel_l1_thresh: .nan", "rel_l1_thresh", " is nan; it must be a finite number"),
    ("policy: fbcache | rel_l1_thresh: .inf", "rel_l1_thresh", " is inf; it must be a finite number"),
    ("policy: fbcache | rel_l1_thresh: high", "rel_l1_thresh", " is 'high'; it must be a finite number"),
    ("policy: fbcache | rel_l1_thresh: true", "rel_l1_thresh", " is True; it must be a finite number"),
    ("policy: fbcache | rel_l1_thresh: ~", "rel_l1_thresh", " is None; it must be a finite number"),
    ("policy: taylorseer | max_order: 1.5", "max_order", " is 1.5; it must be a whole number from 0"),
    ("policy: magcache | mag_ratios: [1, 0]", "mag_ratios", "[1] is 0.0; it must be a finite number above 0"),
    (
        "policy: magcache | mag_ratios: {both: [1]}",
        "mag_ratios",
        ' has the key \'both\'; a key must be one of "cond", "uncond"',
    ),
    ("policy: schedule | mask: [true, false, true]", "mask", " has 3 entries, and the loop has 4 steps"),
    ("policy: schedule | mask: {cond: [1, 0, 1, 0], uncond: [1]}", "mask", "['uncond'] has 1 entries, and the loop"),
    ("policy: spectrum | window_size: 0", "window_size", " is 0.0; it must be a finite number above 0"),
    # gates
    ("policy: none | cfg_gate: 0.5", "cfg_gate", " is an option of no policy: cache.policy is none"),
    ("policy: always | cfg_gate: 1.5", "cfg_gate", " is 1.5; it must be a finite number from 0 to 1"),
    ("policy: always | cfg_gate: late", "cfg_gate", " is 'late'; it must be a finite number"),
    # granularity
    *(
        (
            f"policy: always | granularity: {given}",
            "granularity",
            " is …must be stack, per_block, or a whole number",
        )
        for given in ("blocks", "2.5", "true", "[2]")
    ),
    ("policy: fbcache | granularity: per_block", "granularity", " is 'per_block'; FirstBlockCache works with"),
    ("policy: fbcache | granularity: 1", "granularity", " is 1; FirstBlockCache…an integer from 2"),
    ("policy: always | granularity: 0", "granularity", " is 0; Always works with…an integer from 1"),
    ("policy: magcache | mag_ratios: [1] | granularity: 2", "granularity", ' is 2; MagCache works with "stack"'),
    # speedups
    ("policy: always | target_speedup: 2", "target_speedup", " needs a policy…teacache, magcache…'always'"),
    (
        "policy: magcache | mag_ratios: [1] | threshold: 0.1 | target_speedup: 2",
        "target_speedup",
        " and threshold were both given; each decides the other",
    ),
    ("policy: always | target_speedup: 1", "target_speedup", " is 1; it must be a finite number above 1"),
    ("policy: always | target_speedup: 101", "target_speedup", " is 101…at most 100"),
    ("policy: always | target_speedup: fast", "target_speedup", " is 'fast'"),
    ("policy: always | target_speedup: .inf", "target_speedup", " is inf; it must be a finite number"),
]


@pytest.mark.parametrize(("section", "key", "says"), BAD)
def test_a_bad_section_is_one_sentence_in_its_line(
    model: Path, tmp_path: Path, section: str, key: str, says: str
) -> None:
    lines = section.split(" | ")
    (problem,) = problems_of(write(model, tmp_path, *lines))
    (line,) = (number for number, text in enumerate(lines, 6) if text.startswith(f"{key}:"))
    own = f"cache.{key}" if says.startswith((" ", "[")) else "cache"
    assert re.match(rf":{line}: {re.escape(own)}", problem)
    assert re.search(".*".join(map(re.escape, says.split("…"))), problem)
    assert problem.endswith(".")


def test_an_unknown_policy_is_told_every_valid_one(model: Path, tmp_path: Path) -> None:
    (problem,) = problems_of(write(model, tmp_path, "policy: tea"))
    assert set(problem.removesuffix(".").rpartition("one of ")[2].split(", ")) == {"none", *POLICIES.names()}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cache.policy=tea", "cache.policy is 'tea'"),
        ("cache.rel_l1_thresh=.nan", "cache.rel_l1_thresh is nan"),
        ("cache.granularity=3", "works with"),
        ("cache.target_speedup=2", "cache.target_speedup and rel_l1_thresh were both given"),
        ("cache=teacache", "cache is 'teacache'; it must be a mapping with the keys policy, granularity, target_speed"),
        ("cache.rel=1", "has no option rel;"),
    ],
)
def test_a_bad_override_is_named(model: Path, tmp_path: Path, override: str, words: str) -> None:
    path = write(model, tmp_path, "policy: magcache", "mag_ratios: [1]", "threshold: 0.2")
    if "rel_l1_thresh" in override + words:
        path = write(model, tmp_path, "policy: teacache", "coefficients: [1.0, 0.0]", "rel_l1_thresh: 0.2")
    (problem,) = problems_of(path, [override])
    assert problem.startswith(f"--set {override}: ")
    assert words in problem


def test_a_wrong_number_of_steps_says_nothing_about_the_mask(model: Path, tmp_path: Path) -> None:
    path = write(model, tmp_path, "policy: schedule", "mask: [1, 0]")
    (problem,) = problems_of(path, ["sampling.num_inference_steps=many"])
    assert "num_inference_steps is 'many'" in problem


def test_the_calibration_of_the_model_is_enough_and_named_if_it_is_broken(model: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(model, tmp_path / "model"))
    calibration = own / FILE_NAME
    write_calibration(calibration, "teacache", {"coefficients": [1.0, 0.0]}, {})
    path = write(own, tmp_path, "policy: teacache")
    cache = load_config(path, ["cache.target_speedup=2.5"]).cache
    assert (cache.policy_options, cache.target_speedup) == ({}, 2.5)
    calibration.write_text("{}")
    (problem,) = problems_of(path)
    assert f"{FILE_NAME} is not a calibration of schema 1" in problem
    assert problem.startswith(":6: cache")
    load_config(path, ["cache.coefficients.0=1.5"])  # then nothing is asked of it


BY_BRANCH = "policy: teacache | target_speedup: 2 | coefficients: {cond: [1.5, 0], transformer/uncond: [2]}"
GOOD: list[tuple[str, dict[str, object]]] = [
    ("policy: none", {}),
    ("policy: always | granularity: per_block", {}),
    ("policy: always | granularity: 3", {}),
    ("policy: fbcache | granularity: 2 | rel_l1_thresh: 0", {"rel_l1_thresh": 0}),
    (BY_BRANCH, {"coefficients": {"cond": [1.5, 0], "transformer/uncond": [2]}}),
    ("policy: schedule | mask: [true, false, 1, 0]", {"mask": [True, False, 1, 0]}),
    ("policy: taylorseer | cache_interval: 2", {"cache_interval": 2}),
    ("policy: seacache | threshold: 1e-1", {"threshold": 0.1}),
    ("policy: dicache", {}),
    ("policy: spectrum | warmup_steps: 2 | cfg_gate: 0.5", {"warmup_steps": 2}),
    ("policy: dmd | history_size: 5", {"history_size": 5}),
    ("policy: foca | max_horizon: 2", {"max_horizon": 2}),
    ("policy: easycache | thresh: 0.1 | cfg_gate: 0", {"thresh": 0.1}),
]


@pytest.mark.parametrize(("section", "options"), GOOD)
def test_a_good_section_survives_both_ways_of_writing(
    model: Path, tmp_path: Path, section: str, options: dict[str, object]
) -> None:
    config = load_config(write(model, tmp_path, *section.split(" | ")))
    assert check_config(config) == []
    assert config.cache.policy_options == options
    check_written(config, tmp_path)


def test_overrides_reach_the_options_of_the_policy(model: Path, tmp_path: Path) -> None:
    path = write(model, tmp_path, "policy: teacache", "wan_variant: t2v-14B", "rel_l1_thresh: 0.3")
    config = load_config(path, ["cache.rel_l1_thresh=0.1", "cache.use_ret_steps=true", "cache.granularity=per_block"])
    assert config.cache == CacheOptions(
        policy="teacache", granularity="per_block", wan_variant="t2v-14B", rel_l1_thresh=0.1, use_ret_steps=True
    )
    assert load_config(path, ["cache.rel_l1_thresh=0.2"]) != load_config(path)


def test_a_cache_section_is_checked_without_torch(model: Path, tmp_path: Path) -> None:
    sections = ("policy: teacache | wan_variant: t2v-14B", "policy: magcache | mag_ratios: [1]", "policy: seacache")
    paths = [
        str(write(model, tmp_path, *section.split(" | ")).rename(tmp_path / f"{number}.yaml"))
        for number, section in enumerate(sections)
    ]
    loaded = in_fresh_python(
        "import sys\nfrom pathlib import Path\nfrom edit_ray.config import load_config\n"
        f"for path in {paths!r}:\n"
        "    assert load_config(Path(path)).cache.policy != 'none'\n"
        "print([name for name in ('torch', 'ray', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    assert loaded == "[]"


@pytest.mark.parametrize("override", ["cache=null", "cache.policy=none"])
def test_one_override_switches_the_cache_off(override: str) -> None:
    for path in SHIPPED:
        overrides = ["continuity.mode=none", "continuity.init=null", override]
        assert load_config(path, overrides, check_model=False).cache == CacheOptions()
        later = load_config(path, [*overrides, "cache.policy=always"], check_model=False)
        assert later.cache == CacheOptions(policy="always")


def test_a_file_that_is_submitted_is_checked_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    class Counted(Always):
        def __init__(self) -> None:
            built.append(1)

    monkeypatch.setattr(POLICIES, "_classes", {**POLICIES._classes, "counted": Counted})
    client = LongVideoClient(output=tmp_path / "runs", connect=False)
    shutil.rmtree(client.output)  # so that the submission ends before it starts a Ray
    with pytest.raises(FileNotFoundError):
        client.submit(write(model, tmp_path, "policy: counted"))
    assert built == [1]
    with pytest.raises(ConfigError, match=r"cache\.granularity is 0"):
        client.submit(load_config(write(model, tmp_path, "policy: counted", "granularity: 0"), check_model=False))
