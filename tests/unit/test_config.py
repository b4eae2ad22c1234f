"""Good configurations: what they mean, and that they survive being sent and written; and where runs are written."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.config import Config, PromptSegment, VideoOptions, dump_yaml, load_config, output_root
from edit_ray.config.model import MAX_DURATION_S, format_duration, parse_duration
from edit_ray.config.strict_yaml import dump, parse
from edit_ray.engine.options import SamplingOptions
from edit_ray.errors import ConfigError
from edit_ray.runs.run_plan import segment_seed
from edit_ray.tiers.options import StoreOptions

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def config_of(*entries: dict[str, object], **sections: object) -> Config:
    return Config.model_validate({"video": {"num_segments": 4}, "prompt_segments": entries, **sections})


def prompts(config: Config) -> tuple[str, ...]:
    return tuple(config.storyboard.segment(index).prompt for index in range(config.num_segments))


def check_written(config: Config, folder: Path) -> None:
    """It is read back equal from JSON, and from YAML with and without its empty options."""
    read = [Config.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))]
    for empty in (False, True):
        text = dump_yaml(config, empty=empty)
        assert ("directory: null" in text) == empty
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        read.append(load_config(folder / "run.yaml", check_model=False))
    assert all((again, again.cache.policy_options) == (config, config.cache.policy_options) for again in read)


def test_shipped_configurations_load_and_survive_writing(tmp_path: Path) -> None:
    assert "tiny" in {path.stem for path in SHIPPED}
    for path in SHIPPED:
        check_written(load_config(path, check_model=False), tmp_path)


def test_prompts_hold_from_the_segment_that_contains_their_start() -> None:
    # 33 frames a segment at 16 fps: segment 1 is from 2.0625 s to 4.125 s.
    for zero, start in ((0, "2.1s"), ("0s", "4.1s")):  # 0 needs no unit
        first, last = {"start": zero, "prompt": "a"}, {"segment": 3, "prompt": "c"}
        config = config_of(first, {"start": start, "prompt": "b"}, last)
        assert prompts(config) == ("a", "b", "b", "c")
        assert type(config.prompt_segments[0].start) is float


def test_a_storyboard_changes_more_than_the_prompt() -> None:
    config = config_of(
        {"segment": 0, "prompt": "a"},
        {"segment": 2, "prompt": "b", "negative_prompt": "c", "guidance_scale": 2.0, "seed": 9},
        sampling={"seed": 3, "negative_prompt": "d", "guidance_scale": 5.0},
    )
    segments = [config.storyboard.segment(index) for index in range(4)]
    assert [(s.prompt, s.negative_prompt, s.guidance_scale) for s in segments] == 2 * [("a", "d", 5.0)] + 2 * [
        ("b", "c", 2.0)
    ]
    assert [s.seed for s in segments] == [segment_seed(seed, k) for k, seed in enumerate([3, 3, 9, 9])]


def test_an_endless_video_has_no_number_of_segments_and_survives_writing(tmp_path: Path) -> None:
    config = config_of({"segment": 0, "prompt": "a"}, {"segment": 70, "prompt": "b"}, video={"num_segments": None})
    assert (config.video.endless, config.num_segments, config.num_frames_total) == (True, None, None)
    assert config.storyboard.segment(10**6).prompt == "b"
    check_written(config, tmp_path)


@pytest.mark.parametrize(
    ("continuity", "duration", "segments", "frames"),
    [
        ({"mode": "none"}, "2.0625s", 1, 33),
        ({"mode": "none"}, "2.1s", 2, 66),
        ({"mode": "none"}, "1m", 30, 990),
        ({"mode": "history", "history_latents": 3}, "6.5s", 4, 105),
        ({"mode": "history", "history_latents": 3}, "6.6s", 5, 129),
        ({"mode": "overlap"}, "6.6s", 5, 129),
    ],
)
def test_a_duration_is_covered(continuity: dict[str, object], duration: str, segments: int, frames: int) -> None:
    config = config_of({"segment": 0, "prompt": "a"}, video={"duration": duration}, continuity=continuity)
    assert (config.num_segments, config.num_frames_total) == (segments, frames)
    assert len(prompts(config)) == segments


def test_segments_that_reuse_residuals_alone_are_clips_of_their_own() -> None:
    cache = {"policy": "warmstart_reuse", "reuse_window": 2, "inner": "always"}
    config = config_of({"segment": 0, "prompt": "a"}, continuity={"mode": "warm_start"}, cache=cache)
    assert config.num_frames_total == 4 * 33
    assert not config.layout.denoise_needs_frames


@pytest.mark.parametrize(("source", "needs"), [("hybrid", True), ("reencode", True), ("latent", False)])
def test_what_is_encoded_anew_must_be_decoded_first(source: str, needs: bool) -> None:
    continuity = {"mode": "overlap", "overlap_source": source}
    config = config_of({"segment": 0, "prompt": "a"}, continuity=continuity)
    assert config.layout.denoise_needs_frames == needs


def test_sections_can_be_given_as_objects_and_are_frozen() -> None:
    entry = PromptSegment(segment=0, prompt="a")
    config = Config(sampling=SamplingOptions(seed=3), video=VideoOptions(num_segments=1), prompt_segments=(entry,))
    assert (config.sampling.seed, prompts(config)) == (3, ("a",))
    with pytest.raises(ValueError, match="frozen"):
        config.sampling.seed = 3


def test_bytes_are_read_with_their_units() -> None:
    read = {5: 5, 1e6: 10**6, "0": 0, "1e6": 10**6, "1.5kB": 1500, "1 GB": 10**9, "256MiB": 2**28, "1GiB": 2**30}
    assert {given: StoreOptions.model_validate({"host_bytes": given}).host_bytes for given in read} == read


@pytest.mark.parametrize("given", ["", "MiB", "-1", "1XB", "0.3B", "1e99", "1TiBs", True, None, 0.5, -1, 2**60])
def test_what_is_no_number_of_bytes_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="host_bytes"):
        StoreOptions.model_validate({"host_bytes": given})


def test_durations_are_read_with_their_units() -> None:
    read = {"6.5s": 6.5, "2m": 120, "1m30s": 90, "1h": 3600, "0s": 0, " 3s ": 3}
    assert {given: parse_duration(given) for given in read} == read


@pytest.mark.parametrize("given", ["", "s", "5", "-1s", "1s2m", "1e3s", "8000000000s", "1d", "٣s", "1 s"])
def test_what_is_no_duration_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(given)


@given(st.floats(0, MAX_DURATION_S))
def test_a_written_duration_is_read_back_exactly(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
scalar = st.one_of(text, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none())


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(text, st.one_of(scalar, st.lists(scalar), st.dictionaries(text, scalar)), min_size=1))
def test_written_yaml_is_read_back_exactly(data: dict[str, object]) -> None:
    document = parse(dump(data))
    assert document.mistakes == []
    assert document.data == data
    assert repr(document.data) == repr(data)


def test_plain_scalars_mean_what_they_look_like() -> None:
    values = {"1e6": 1e6, "true": True, "~": None, "": None, "007": 7, "-.5": -0.5}
    values |= {text: text for text in ("no", "on", "1:30", "0x10", "2026-01-01", "=", "<<")}
    for plain, value in values.items():
        document = parse(f"key: {plain}\n")
        assert document.mistakes == []
        assert document.data == {"key": value}
        assert type(document.data["key"]) is type(value)


def test_options_are_written_over_the_file() -> None:
    sampling = [f"sampling.{change}" for change in ("seed=11", "seed=12", "guidance_scale=1", "negative_prompt='no'")]
    more = ["video.num_segments=null", "video.duration=10s", "prompt_segments.1.prompt=a green ring: [bouncing] # fast"]
    config = load_config(SHIPPED[0], sampling + more, check_model=False)
    assert (config.sampling.seed, config.sampling.guidance_scale, config.sampling.negative_prompt) == (12, 1.0, "no")
    assert config.num_segments == 7
    assert prompts(config)[-1] == "a green ring: [bouncing] # fast"


def test_options_alone_are_enough() -> None:
    options = ["video.num_segments=1", "prompt_segments.0.segment=0", "prompt_segments.0.prompt=a cat"]
    assert prompts(load_config(None, options, check_model=False)) == ("a cat",)


# Where runs are written


def problem_of(option: str | None, environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        output_root(option, environ)
    (problem,) = caught.value.problems
    return problem


def test_the_option_comes_before_the_variable_before_the_home(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path / "home"), "EDIT_RAY_OUTPUT": str(tmp_path / "variable")}
    assert output_root(str(tmp_path / "option"), environ) == tmp_path / "option"
    assert output_root(None, environ) == tmp_path / "variable"
    assert output_root(None, environ | {"EDIT_RAY_OUTPUT": ""}) == tmp_path / "home" / "edit_ray_outputs"
    assert output_root("~/mine", environ) == tmp_path / "home" / "mine"


def test_the_root_is_absolute_private_and_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = output_root("a/../b", {})
    assert root == tmp_path / "b"
    assert root.stat().st_mode & 0o777 == 0o700
    assert list(root.iterdir()) == []
    assert output_root("b", {}) == root


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    said = f"--output is {str(file)!r}, a file; it must be a folder that can be written."
    assert problem_of(str(file), {}) == said
    assert "below a file" in problem_of(None, {"EDIT_RAY_OUTPUT": str(file / "below")})


@pytest.mark.parametrize("option", ["/proc/edit_ray", "/sys/edit_ray", "/dev/null/x", "", "  ", "nul\0l", "x" * 300])
def test_what_is_no_path_or_cannot_be_written_even_by_root_is_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert problem_of(option, {}).startswith("--output is ")
    assert list(tmp_path.iterdir()) == []


def test_a_ray_job_s_unpacked_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    problem = problem_of("out", {})
    assert "'out'" in problem
    assert "inside a Ray job's unpacked files" in problem
    assert not (job / "out").exists()
    (tmp_path / "link").symlink_to(job)
    assert "inside a Ray job" in problem_of(str(tmp_path / "link" / "out"), {})
    assert output_root(str(tmp_path / "out"), {}) == tmp_path / "out"
