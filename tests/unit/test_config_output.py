"""Where runs are written."""

from pathlib import Path

import pytest

from edit_ray.config import output_root
from edit_ray.errors import ConfigError


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
