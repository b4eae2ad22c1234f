"""The cache section: every mistake in it is one sentence with its place, found without torch and without weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edit_ray.cache.options import CacheOptions
from edit_ray.cache.policies import POLICIES, Always
from edit_ray.client import LongVideoClient
from edit_ray.config import Config, check_config, dump_yaml, load_config
from edit_ray.engine.calibration import FILE_NAME, write_calibration
from edit_ray.errors import ConfigError
from edit_ray.testing import save_random_wan

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
FILE = """\
model: {{path: {model}, device: cpu}}
sampling: {{height: 32, width: 32, num_frames: 5, num_inference_steps: 4}}
video: {{num_segments: 1}}
prompt_segments: [{{segment: 0, prompt: a red circle}}]
cache:
{section}
"""
FITTED = "[1.0, 0.0]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan model without its weights and without a calibration."""
    folder = save_random_wan(tmp_path_factory.mktemp("wan"))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def calibration(model: Path) -> Path:
    """The model's own, which the test may overwrite; removed afterwards."""
    file = model / FILE_NAME
    write_calibration(file, "teacache", {"coefficients": [1.0, 0.0]}, {})
    yield file
    file.unlink(missing_ok=True)


def write(model: Path, folder: Path, *section: str) -> Path:
    """A configuration whose cache section, from line 6 on, is `section`."""
    path = folder / "run.yaml"
    path.write_text(FILE.format(model=model, section="\n".join(f"  {line}" for line in section)))
    return path


def problems_of(path: Path, overrides: Sequence[str] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return tuple(problem.removeprefix(str(path)) for problem in caught.value.problems)


# The lines of the section, the line that is named, and words of the sentence.
BAD: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = [
    (("policy: tea",), 6, ("cache.policy is 'tea'; it must be one of none, always, dicache, fb",)),
    (("policy: ''",), 6, ("cache.policy is ''; it must be text of 1 to 200 characters",)),
    (("policy: [teacache]",), 6, ("cache.policy is a list of 1; it must be text",)),
    (("rel_l1_thresh: 0.1", "policy: ~"), 7, ("cache.policy is empty (null); it must be text",)),
    # reuse between segments
    (
        ("policy: warmstart_reuse", "wan_variant: t2v-14B"),
        6,
        ("cache.reuse_window is 0 and cache.policy 'warmstart_reuse'; for segments that reuse each other's residuals",),
    ),
    (("policy: always", "reuse_window: 2"), 7, ("cache.reuse_window is 2 and cache.policy 'always'; for segments",)),
    (("policy: none", "reuse_window: 2"), 7, ("cache.reuse_window is an option of no policy",)),
    (("reuse_window: -1", "policy: always"), 6, ("cache.reuse_window is -1; it must be",)),
    (
        ("policy: warmstart_reuse", "inner: always", "reuse_window: 2", "align: last"),
        9,
        ("cache.align is 'last', which works in the library; in a run it must be 'step'",),
    ),
    # options of no policy
    (("rel_l1_thresh: 0.1",), 6, ("cache.rel_l1_thresh is an option of no policy: cache.policy is none",)),
    (("policy: none", "threshold: 0.1"), 7, ("cache.threshold is an option of no policy",)),
    (("policy: none", "target_speedup: 2"), 7, ("cache.target_speedup is an option of no policy",)),
    # options that the policy has not
    (
        ("policy: teacache", "wan_variant: t2v-14B", "rel_thresh: 0.1"),
        8,
        ("'teacache' has no option rel_thresh; it takes rel_l1_thresh, wan_variant, coefficients, use_ret_steps",),
    ),
    (("policy: fbcache", "x: 1", "cache: 2"), 7, ("'fbcache' has no option x, cache; it takes rel_l1_thresh",)),
    (("policy: always", "granularty: stack"), 7, ("'always' has no option granularty; it takes none",)),
    (("policy: fbcache", "mask: [true]"), 7, ("'fbcache' has no option mask; it takes rel_l1_thresh",)),
    # what is missing
    (("policy: teacache", "rel_l1_thresh: 0.1"), 6, ("teacache takes either wan_variant= (one of t2v-1.3B", "neither")),
    (("granularity: stack", "policy: magcache"), 7, ("magcache needs mag_ratios=, measured on the model at hand",)),
    (("policy: schedule",), 6, ("'schedule' needs the option mask; it takes mask, residual_order",)),
    # values
    (
        ("policy: teacache", "wan_variant: t2v-2B"),
        7,
        ("cache.wan_variant is 't2v-2B'; valid are t2v-1.3B, t2v-14B, i2v-480p, i2v-720p",),
    ),
    (("policy: teacache", "wan_variant: t2v-14B", f"coefficients: {FITTED}"), 7, ("wan_variant=", "was given both")),
    (("policy: fbcache", "rel_l1_thresh: .nan"), 7, ("cache.rel_l1_thresh is nan; valid is a finite number",)),
    (("policy: fbcache", "rel_l1_thresh: .inf"), 7, ("cache.rel_l1_thresh is inf; valid is a finite number",)),
    (("policy: fbcache", "rel_l1_thresh: high"), 7, ("cache.rel_l1_thresh is 'high'; valid is a finite number",)),
    (("policy: fbcache", "rel_l1_thresh: true"), 7, ("cache.rel_l1_thresh is True; valid is a finite number",)),
    (("policy: fbcache", "rel_l1_thresh: ~"), 7, ("cache.rel_l1_thresh is None; valid is a finite number",)),
    (("policy: taylorseer", "max_order: 1.5"), 7, ("cache.max_order is 1.5; valid is a whole number from 0",)),
    (("policy: magcache", "mag_ratios: [1, 0]"), 7, ("cache.mag_ratios[1] is 0.0; valid is a finite number above 0",)),
    (
        ("policy: magcache", "mag_ratios: {both: [1]}"),
        7,
        ('cache.mag_ratios has the key \'both\'; valid are "cond", "uncond"',),
    ),
    (
        ("policy: schedule", "mask: [true, false, true]"),
        7,
        ("cache.mask has 3 entries, and the loop has 4 steps; it takes one each",),
    ),
    (
        ("policy: schedule", "mask: {cond: [1, 0, 1, 0], uncond: [1]}"),
        7,
        ("cache.mask['uncond'] has 1 entries, and the loop has 4 steps",),
    ),
    # granularity
    *(
        (("policy: always", f"granularity: {given}"), 7, ("it must be stack, per_block, or a whole number of blocks",))
        for given in ("blocks", "2.5", "true", "[2]")
    ),
    (
        ("policy: fbcache", "granularity: per_block"),
        7,
        ("cache.granularity is 'per_block'; FirstBlockCache works with",),
    ),
    (("policy: fbcache", "granularity: 1"), 7, ("cache.granularity is 1; FirstBlockCache", "an integer from 2")),
    (("policy: always", "granularity: 0"), 7, ("cache.granularity is 0; Always works with", "an integer from 1")),
    (
        ("policy: magcache", "mag_ratios: [1]", "granularity: 2"),
        8,
        ('cache.granularity is 2; MagCache works with "stack"',),
    ),
    # speedups
    (("policy: always", "target_speedup: 2"), 7, ("target_speedup needs a policy", "teacache, magcache", "'always'")),
    (
        ("policy: magcache", "mag_ratios: [1]", "threshold: 0.1", "target_speedup: 2"),
        9,
        ("cache.target_speedup and threshold were both given; each decides the other",),
    ),
    (("policy: always", "target_speedup: 1"), 7, ("cache.target_speedup is 1; it must be a finite number above 1",)),
    (("policy: always", "target_speedup: 101"), 7, ("cache.target_speedup is 101", "at most 100")),
    (("policy: always", "target_speedup: fast"), 7, ("cache.target_speedup is 'fast'",)),
    (("policy: always", "target_speedup: .inf"), 7, ("cache.target_speedup is inf; it must be a finite number",)),
]


@pytest.mark.parametrize(("section", "line", "words"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_section_is_one_sentence_in_its_line(
    model: Path, tmp_path: Path, section: Sequence[str], line: int, words: Sequence[str]
) -> None:
    (problem,) = problems_of(write(model, tmp_path, *section))
    assert problem.startswith(f":{line}: cache")
    assert problem.endswith(".")
    assert [word for word in words if word not in problem] == []


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
        path = write(model, tmp_path, "policy: teacache", f"coefficients: {FITTED}", "rel_l1_thresh: 0.2")
    (problem,) = problems_of(path, [override])
    assert problem.startswith(f"--set {override}: ")
    assert words in problem


def test_a_wrong_number_of_steps_says_nothing_about_the_mask(model: Path, tmp_path: Path) -> None:
    path = write(model, tmp_path, "policy: schedule", "mask: [1, 0]")
    assert len(problems_of(path)) == 1
    (problem,) = problems_of(path, ["sampling.num_inference_steps=many"])
    assert "num_inference_steps is 'many'" in problem


def test_mistakes_in_other_sections_come_with_it(model: Path, tmp_path: Path) -> None:
    problems = problems_of(write(model, tmp_path, "policy: tea"), ["sampling.height=40", "output.crf=99"])
    assert len(problems) == 3
    assert all(key in str(problems) for key in ("cache.policy", "sampling.height", "output.crf"))


def test_a_broken_calibration_is_named(model: Path, tmp_path: Path, calibration: Path) -> None:
    path = write(model, tmp_path, "policy: teacache")
    load_config(path)
    calibration.write_text("{}")
    (problem,) = problems_of(path)
    assert f"{FILE_NAME} is no calibration of schema 1" in problem
    assert problem.startswith(":6: cache")
    load_config(path, [f"cache.coefficients.0={1.5}"])  # then nothing is asked of it


GOOD: list[tuple[tuple[str, ...], dict[str, object]]] = [
    (("policy: none",), {}),
    (("policy: always", "granularity: per_block"), {}),
    (("policy: always", "granularity: 3"), {}),
    (("policy: fbcache", "granularity: 2", "rel_l1_thresh: 0"), {"rel_l1_thresh": 0}),
    (("policy: teacache", "wan_variant: t2v-1.3B", "use_ret_steps: true"), None),
    (
        ("policy: teacache", "target_speedup: 2", "coefficients:", "  cond: [1.5, 0]", "  transformer/uncond: [2]"),
        {"coefficients": {"cond": [1.5, 0], "transformer/uncond": [2]}},
    ),
    (("policy: magcache", "mag_ratios: [1.0, 0.9, 0.8]", "threshold: 0.1"), None),
    (("policy: schedule", "mask: [true, false, 1, 0]"), {"mask": [True, False, 1, 0]}),
    (("policy: taylorseer", "cache_interval: 2"), {"cache_interval": 2}),
    (("policy: seacache", "threshold: 1e-1"), {"threshold": 0.1}),
    (("policy: dicache",), {}),
]


@pytest.mark.parametrize(("section", "options"), GOOD, ids=lambda value: str(value)[:60])
def test_a_good_section_survives_both_ways_of_writing(
    model: Path, tmp_path: Path, section: Sequence[str], options: dict[str, object] | None
) -> None:
    config = load_config(write(model, tmp_path, *section))
    assert check_config(config) == []
    if options is not None:
        assert config.cache.policy_options == options
    sent = json.loads(json.dumps(config.model_dump(mode="json")))
    assert Config.model_validate(sent) == config
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert again.cache.policy_options == config.cache.policy_options


def test_overrides_reach_the_options_of_the_policy(model: Path, tmp_path: Path) -> None:
    path = write(model, tmp_path, "policy: teacache", "wan_variant: t2v-14B", "rel_l1_thresh: 0.3")
    config = load_config(path, ["cache.rel_l1_thresh=0.1", "cache.use_ret_steps=true", "cache.granularity=per_block"])
    assert config.cache == CacheOptions(
        policy="teacache", granularity="per_block", wan_variant="t2v-14B", rel_l1_thresh=0.1, use_ret_steps=True
    )
    other = load_config(path, ["cache.rel_l1_thresh=0.2"])
    assert other.cache != config.cache
    assert other != load_config(path)


def test_the_calibration_of_the_model_is_enough(model: Path, tmp_path: Path, calibration: Path) -> None:
    config = load_config(write(model, tmp_path, "policy: teacache", "target_speedup: 2.5"))
    assert config.cache.policy_options == {}
    assert config.cache.target_speedup == 2.5


def test_a_cache_section_is_checked_without_torch(model: Path, tmp_path: Path) -> None:
    sections = [
        write(model, tmp_path, "policy: teacache", "wan_variant: t2v-14B", "target_speedup: 2").rename(tmp_path / "1"),
        write(model, tmp_path, "policy: magcache", "mag_ratios: [1]").rename(tmp_path / "2"),
        write(model, tmp_path, "policy: seacache").rename(tmp_path / "3"),
    ]
    code = (
        "import sys\nfrom pathlib import Path\nfrom edit_ray.config import load_config\n"
        f"for path in {[str(path) for path in sections]!r}:\n"
        "    assert load_config(Path(path)).cache.policy != 'none'\n"
        "print([name for name in ('torch', 'ray', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("override", ["cache=null", "cache.policy=none"])
def test_one_override_switches_the_cache_off(override: str) -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        overrides = ["continuity.mode=none", "continuity.init=null", override]
        assert load_config(path, overrides, check_model=False).cache == CacheOptions()
        later = load_config(path, [*overrides, "cache.policy=always"], check_model=False)
        assert later.cache == CacheOptions(policy="always")


def test_a_cache_that_is_null_in_a_file_is_none(tmp_path: Path, model: Path) -> None:
    path = write(model, tmp_path)
    path.write_text(path.read_text().replace("cache:\n", "cache: null\n"))
    assert load_config(path).cache == CacheOptions()


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
