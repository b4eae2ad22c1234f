"""Whatever a configuration holds: it is understood, or refused in sentences that any terminal can print."""

import json
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edit_ray.config import load_config
from edit_ray.errors import ConfigError
from tests.unit.test_config_errors import GOOD


def said_of(path: Path, overrides: Sequence[str] = ()) -> Sequence[str]:
    """Every mistake in a configuration; none where it is understood. Whatever else it raises fails the test."""
    try:
        load_config(path, overrides, check_model=False)
    except ConfigError as error:
        return error.problems or [""]
    return []


def are_lines(problems: Sequence[str]) -> bool:
    return all(problem and problem.isprintable() for problem in problems)


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = ["model", "sampling", "video", "prompt_segments", "continuity", "store", "num_segments", "duration", "start"]
KEYS += ["prompt", "segment", "num_frames", "fps", "mode", "history_latents", "host_bytes", "path", "directory"]
VALUES = ["0s", "3s", "1e6", "256MiB", "history", "none", "", " ", ".nan", "\ud800", "\0"]
leaves = st.none() | st.booleans() | st.integers(-5, 50) | st.integers() | st.floats() | st.text(max_size=8)
keys = st.sampled_from(KEYS) | st.text(max_size=3)
trees = st.recursive(
    leaves | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=25,
)


@fuzz
@given(st.binary(max_size=200) | st.text("ab:- \n{}[]&*!|>'\"%#?,\\0u\t", max_size=60).map(str.encode))
def test_random_bytes_and_yaml_are_refused_in_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fuzz.yaml").write_bytes(content)
    problems = said_of(tmp_path / "fuzz.yaml")
    assert problems
    assert are_lines(problems)


@fuzz
@given(trees)
def test_random_trees_raise_nothing_else(tmp_path: Path, tree: object) -> None:
    # JSON is YAML too, and its escapes reach what YAML text cannot hold.
    (tmp_path / "fuzz.yaml").write_text(json.dumps(tree))
    assert are_lines(said_of(tmp_path / "fuzz.yaml"))


@fuzz
@given(
    st.lists(st.tuples(st.lists(st.sampled_from([*KEYS, "0", "1", "x"]), max_size=4), st.text(max_size=9)), max_size=4)
)
def test_random_options_raise_nothing_else(tmp_path: Path, options: list[tuple[list[str], str]]) -> None:
    (tmp_path / "fuzz.yaml").write_text(GOOD)
    assert are_lines(said_of(tmp_path / "fuzz.yaml", [f"{'.'.join(key)}={value}" for key, value in options]))
