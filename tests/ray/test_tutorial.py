"""docs/tutorial.md from top to bottom: an empty folder, a fresh virtual environment, edit_ray from its wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.ray.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "tutorial.md").read_text()


def steps():
    """In the order of the page: a file with its content, or a line of a console."""
    for name, language, content in re.findall(r"(?:^`([\w.]+)`:\n\n)?^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S):
        yield from [(name, content)] if language != "console" else [("", line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made of a copy, so that nothing is left in the clone."""
    source = tmp_path_factory.mktemp("source") / "clone"
    unwanted = shutil.ignore_patterns("__pycache__", "node_modules")
    shutil.copytree(REPOSITORY / "edit_ray", source / "edit_ray", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(source / "dist"), "."]
    subprocess.run(command, cwd=source, check=True)
    (made,) = (source / "dist").iterdir()
    return made


@pytest.mark.slow
def test_the_wheel_has_the_embedded_model_and_no_more_than_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    model = {name.removeprefix("edit_ray/assets/tiny_wan/") for name in names if name.startswith("edit_ray/assets/")}
    there = REPOSITORY / "edit_ray" / "assets" / "tiny_wan"
    assert model == {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert all(name.startswith(("edit_ray/", "edit_ray-")) for name in names)
    assert wheel.stat().st_size < 20 * 2**20


@pytest.mark.slow
def test_the_tutorial(wheel, tmp_path):
    shutil.copy(wheel, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AD", "PYTHONPATH"))}
    said = {}
    for name, content in steps():
        if name:
            (tmp_path / name).write_text(content)
            continue
        command = content.split()
        if command[0].endswith("pip"):  # what edit_ray needs is there already, and takes minutes to download
            command[2:2] = ["--no-deps", "--quiet"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900)
        assert done.returncode == 0, f"{content}\n{done.stdout}\n{done.stderr}"
        said[content] = done.stdout.splitlines()
        if command[-1] == ".venv":
            packages = next((tmp_path / ".venv" / "lib").glob("python*/site-packages"))
            (packages / "those_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    masks = [line.split() for line in said[".venv/bin/python try_it.py"]]
    assert [mask[0] for mask in masks] == ["0.0", "0.1", "0.3"]
    assert "·" not in masks[0][1]
    assert 0 < float(masks[1][2]) < float(masks[2][2])
    *segments, path = said[".venv/bin/python run_it.py"]
    assert [line.split()[0] for line in segments] == ["0", "1"]
    assert all(float(line.split()[-1]) > 0 for line in segments)
    assert (Path(path) / "final.mp4").is_file()
    where = [".venv/bin/python", "-c", "import edit_ray; print(edit_ray.__file__)"]
    home = subprocess.run(where, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True).stdout
    assert Path(home).is_relative_to(tmp_path), "it was the installed one, not the clone"
