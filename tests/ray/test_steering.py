"""Runs on Ray that are steered, paused and branched, by the client and by the command line."""

import os
import signal

import pytest
import ray

from edit_ray.actors import launch
from edit_ray.cli.main import main
from edit_ray.client import LongVideoClient
from edit_ray.config import load_config
from edit_ray.errors import ConfigError, RunEnded
from edit_ray.runs.folder import RunFolder
from tests.chaos.undisturbed import told
from tests.ray.conftest import manifest_of, wait_until
from tests.runs_here import everything


def test_a_run_is_steered_through_the_death_of_its_scheduler_and_branched(ray_head, config, tmp_path, run_id, capsys):
    def edit_ray(*arguments):
        code = main(["--output", str(tmp_path), *arguments])
        return code, *capsys.readouterr()

    client = LongVideoClient(output=tmp_path)
    client.submit(config(segments=4), run_id=run_id)
    assert client.pause(run_id).held_by == "pause"
    edit = client.steer(run_id, 2, prompt="a blue square", request="once")
    pid = ray.get(launch.find_segment_scheduler().describe.remote())["pid"]
    os.kill(pid, signal.SIGKILL)
    assert client.steer(run_id, 2, prompt="a blue square", request="once") == edit, "it is kept, and made once"
    code, said, _ = edit_ray("status", run_id)
    assert (code, f"paused: no further segment begins before `edit-ray unpause {run_id}`" in said) == (0, True), said
    assert edit_ray("steer", run_id, "--from", "3", "--seed", "9")[:2] == (0, f"{run_id}: it holds from segment 3 on\n")
    with pytest.raises(ConfigError, match="from_segment is 4; the last segment of run"):
        client.steer(run_id, 4, seed=1)
    assert edit_ray("unpause", run_id)[0] == 0
    wait_until(lambda: client.status(run_id).state == "done")
    with pytest.raises(RunEnded, match="has ended"):
        client.steer(run_id, seed=1)
    branch = client.branch(run_id, 3, new_id=f"{run_id}-longer", num_segments=5, seed=9)
    assert (branch.branched_from, branch.committed >= 3) == (run_id, True)
    assert edit_ray("branch", run_id, "--at", "0", "--new-id", f"{run_id}-remix", "--prompt", "a red circle")[0] == 0
    told_from_the_start = told(load_config(tmp_path / run_id / "run.yaml"), 4, manifest_of(tmp_path / run_id).changes)
    client.submit(told_from_the_start, run_id=f"{run_id}-told")
    for name in ("longer", "remix", "told"):
        wait_until(lambda name=name: client.status(f"{run_id}-{name}").state == "done")
    one, same = (everything(RunFolder(tmp_path, name)) for name in (run_id, f"{run_id}-told"))
    assert [name for name in one if one[name] != same.get(name)] == ["run.yaml"]
    longer = manifest_of(tmp_path / f"{run_id}-longer").segments
    assert [record.prompt for record in longer] == ["a red circle"] * 2 + ["a blue square"] * 3
    assert edit_ray("verify", f"{run_id}-longer")[0] == 0
