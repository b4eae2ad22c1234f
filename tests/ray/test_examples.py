"""The examples that need Ray run as they stand, on a Ray that is there."""

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
