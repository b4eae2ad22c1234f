"""The GPU benchmarks that run the actors, once, at a toy size on the CPU, each on a Ray of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overhead", "scale"])
def test_all_of_it(name, tmp_path):
    given = ["--quick", "--device", "cpu", "--output", str(tmp_path / "out"), "--directory", str(tmp_path / "runs")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    if name == "overhead":
        assert rows["latents equal diffusers'"]["equal"] == rows["latents equal diffusers'"]["compared"] == 2
        assert rows["three actors"]["ratio"] > 0
    else:
        assert len(rows["two runs on two GPUs"]["of_each"]) == 2
    whys = [left["why"] for left in content["left_out"]]
    assert all(why in ("only a CUDA device says", "there are no two GPUs") for why in whys), whys
