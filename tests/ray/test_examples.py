"""The examples and the README's code that need Ray run as they stand, on a Ray that is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edit_ray.actors import launch
from tests.ray.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["storyboard", "contact_sheet"])
def test_an_example_runs_without_arguments(ray_head, tmp_path, name):
    launch.end_actors()  # those that live have another model
    environment = ray_head | {"EDIT_RAY_OUTPUT": str(tmp_path / "runs"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900)
    launch.end_actors()
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "segment" in line]
    assert len(lines) == 3
    if name == "storyboard":
        assert "joins with a score of" in lines[2]
        assert Path(done.stdout.splitlines()[-1]).is_file()
    else:
        with Image.open(tmp_path / "contact_sheet.png") as sheet:
            assert sheet.size == (6 * 128, 3 * 128)


@pytest.mark.slow
def test_the_client_of_the_readme_runs(ray_head, tmp_path):
    launch.end_actors()
    blocks = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "LongVideoClient" in block]
    environment = ray_head | {"EDIT_RAY_OUTPUT": str(tmp_path / "runs"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=900)
    launch.end_actors()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert all("(33, 128, 128, 3)" in line or "(24, 128, 128, 3)" in line for line in lines)
