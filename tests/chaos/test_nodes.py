"""A node is lost in the middle of a run: another one finishes it, to the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edit_ray.runs.folder import RunFolder
from tests.chaos.nodes import SEGMENTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_outlives_the_node_that_worked_on_it(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AD")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.nodes", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"] == "done"
    assert found["segments"] == list(range(SEGMENTS)), "each once, and in order"
    before, after = found["before"], found["after"]
    assert before["denoiser"] == before["cache_store"] == found["lost"], "the two are on one node"
    assert after["denoiser"] == after["cache_store"] != found["lost"], "and so they are when it is another"
    assert before["segment_scheduler"] == after["segment_scheduler"] == found["head"]
    assert found["entries_lost"] > 0
    assert found["made_again"] > 0, "what the node had for later segments was made anew"
    whole, hurt = RunFolder(tmp_path / "runs", "whole"), RunFolder(tmp_path / "runs", "hurt")
    assert whole.final.read_bytes() == hurt.final.read_bytes()
    for index in range(SEGMENTS):
        assert whole.latents(index).read_bytes() == hurt.latents(index).read_bytes()
