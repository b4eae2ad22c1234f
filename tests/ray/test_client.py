"""The client, from other processes than the job's, while actors and drivers die."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from ray._private.state import actors

import edit_ray
from edit_ray import LongVideoClient
from edit_ray.actors import launch
from edit_ray.cli.main import main
from edit_ray.config import load_config
from edit_ray.errors import ActorVersionMismatch, RunCancelled, UnknownRun
from edit_ray.metrics.exporter import TARGETS
from edit_ray.video.encode import read_frames
from tests.ray.conftest import manifest_of, pids, wait_until
from tests.sockets import listening

WATCH = """
import json, sys, time
from edit_ray import LongVideoClient
client = LongVideoClient(output=sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for segment in client.stream(sys.argv[2], start=int(sys.argv[3])):
    progress = client.status(sys.argv[2]).progress
    at = [progress.segment_index, progress.step] if progress else None
    print(json.dumps([segment.index, segment.frames.shape, at, segment.fps]), flush=True)
"""


@pytest.fixture
def watch(spawn):
    """A client in a process of its own, connected; told to `go`, it prints a line per segment."""

    def start(root, run_id, start=0):
        process = spawn("-c", WATCH, str(root), run_id, str(start))
        assert process.stdout.readline() == "ready\n"
        return process

    return start


def go(watcher):
    print("go", file=watcher.stdin, flush=True)


def test_three_actors_are_three_processes_with_one_socket_of_ours_on_loopback(ray_head, config, tmp_path):
    client = LongVideoClient(output=tmp_path)
    run_id = client.submit(config(segments=1))
    assert [segment.index for segment in client.stream(run_id)] == [0]
    found = pids()
    assert len(set(found.values())) == 3
    assert os.getpid() not in found.values()
    with_torch = [name for name, pid in found.items() if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
    assert with_torch == [launch.DENOISER, launch.CACHE_STORE], "the segment scheduler is to start quickly"
    assert sockets_of_ours(found) == {("segment_scheduler", exporter_of(tmp_path))}
    made = [path for path in (tmp_path / run_id).rglob("*") if path.is_file()]
    assert {path.suffix for path in made} == {".yaml", ".jsonl", ".safetensors", ".mp4", ".m4s", ".m3u8"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in made), "no pickle, no archive with one"


def test_who_asks_for_more_gpu_actors_than_the_nodes_hold_is_told(config, tmp_path, run_id):
    client = LongVideoClient(output=tmp_path)
    client.submit(load_config(config(segments=1), ["engine.gpu_actors=64"]), run_id=run_id)
    places = int(ray.cluster_resources()["CPU"])
    asked = f"asks for 64 GPU actors, and the nodes of this Ray cluster have places for {places}; further runs wait"
    assert asked in client.status(run_id).warning
    assert [segment.index for segment in client.stream(run_id, frames=False)] == [0]


def sockets_of_ours(pids):
    """Who listens where, but for the one socket by which Ray's core worker takes the calls of an actor, or a driver."""
    rays_own = {actor["Pid"]: actor["Address"]["Port"] for actor in actors().values() if actor["State"] == "ALIVE"}
    assert len(listening(os.getpid())) == 1
    found = {name: listening(pid) for name, pid in pids.items()}
    assert all(rays_own[pids[name]] in {port for _, port in sockets} for name, sockets in found.items())
    return {(name, at) for name, sockets in found.items() for at in sockets if at[1] != rays_own[pids[name]]}


def exporter_of(root):
    """Where the file of Prometheus' targets says that the metrics are: on loopback."""
    ((target,),) = [entry["targets"] for entry in json.loads((root / "edit_ray_targets.json").read_text())]
    address, _, port = target.partition(":")
    assert address == "127.0.0.1"
    return address, int(port)


def test_another_process_sees_segments_as_they_come_and_a_killed_driver_does_not_end_its_run(
    watch, start_job, config, tmp_path, run_id
):
    watcher = watch(tmp_path, run_id)
    driver = start_job("--config", str(config(steps=80)), "--output", str(tmp_path), "--run-id", run_id)
    assert any(line.startswith("run: ") for line in driver.stdout)
    go(watcher)
    index, shape, at, fps = json.loads(watcher.stdout.readline())
    assert (index, shape, fps) == (0, [17, 64, 64, 3], 16)
    assert at is not None
    assert at < [2, 80], "segment 2 was not finished when segment 0 had arrived"
    driver.kill()
    driver.wait(10)
    assert [json.loads(line)[0] for line in watcher.stdout] == [1, 2, 3]
    assert manifest_of(tmp_path / run_id).state == "done"
    late = watch(tmp_path, run_id, start=2)
    go(late)
    assert [json.loads(line)[0] for line in late.stdout] == [2, 3]


def test_every_reader_sees_the_same_frames_and_may_have_the_latents(ray_head, config, tmp_path):
    client = LongVideoClient(output=tmp_path)
    run_id = client.submit(load_config(config(segments=2)))
    first = list(client.stream(run_id, latents=True))
    again = list(client.stream(run_id))
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.frames, two.frames)
        assert two.latents is None
    assert [tuple(segment.latents.shape[2:3]) for segment in first] == [(5,), (3,)]
    final = read_frames(tmp_path / run_id / "final.mp4", height=64, width=64)
    assert np.array_equal(final, np.concatenate([segment.frames for segment in again]))
    (lazy,) = client.stream(run_id, start=1, frames=False)
    assert lazy.frames is None
    assert lazy.path.is_file()


def test_cancel_keeps_what_is_committed(ray_head, config, tmp_path):
    client = LongVideoClient(output=tmp_path)
    run_id = client.submit(config(steps=200))
    stream = client.stream(run_id, frames=False)
    assert next(stream).index == 0
    client.cancel(run_id)
    with pytest.raises(RunCancelled, match="was stopped"):
        list(stream)
    assert manifest_of(tmp_path / run_id).state == "cancelled"
    assert next(client.stream(run_id)).index == 0


def test_an_unknown_run_is_named(ray_head, tmp_path):
    client = LongVideoClient(output=tmp_path)
    with pytest.raises(UnknownRun, match="no run 'nobody'"):
        next(client.stream("nobody"))
    with pytest.raises(UnknownRun, match="no run 'nobody'"):
        client.status("nobody")


def test_actors_of_other_code_are_refused(ray_head, config, tmp_path, run_id):
    LongVideoClient(output=tmp_path).submit(config(segments=1), run_id=f"{run_id}-first")
    package = tmp_path / "edited" / "edit_ray"
    shutil.copytree(os.path.dirname(edit_ray.__file__), package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "errors.py").write_text((package / "errors.py").read_text() + "\n# edited\n")
    script = "import sys; from edit_ray import LongVideoClient; LongVideoClient(output=sys.argv[1]).submit(sys.argv[2])"
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(config(segments=1))],
        cwd=tmp_path,
        env=ray_head | {"PYTHONPATH": str(package.parent)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert other.returncode == 1
    assert ActorVersionMismatch.__name__ in other.stderr
    assert "edit-ray down" in other.stderr


@pytest.fixture
def edit_ray_as(monkeypatch, capsys):
    """What the command line returns and says to an owner of runs."""

    def run(owner, root, *arguments):
        monkeypatch.setenv("EDIT_RAY_OWNER", owner)
        return main([*arguments, "--output", str(root)]), *capsys.readouterr()

    return run


@pytest.mark.usefixtures("ray_head")
def test_a_run_at_work_is_ended_by_its_owner_alone_and_by_its_root_and_id(
    config, tmp_path, run_id, monkeypatch, edit_ray_as
):
    monkeypatch.setenv("EDIT_RAY_OWNER", "ada")
    client = LongVideoClient(output=tmp_path)
    client.submit(config(steps=400, segments=100), run_id=run_id)
    wait_until(lambda: client.status(run_id).state == "running")
    before = pids()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / run_id, elsewhere / run_id)
    for owner, root, command, says in (
        ("bob", tmp_path, ["cancel", run_id], f"run {run_id!r} belongs to 'ada', and you are 'bob'"),
        ("bob", tmp_path, ["resume", run_id], f"run {run_id!r} belongs to 'ada', and you are 'bob'"),
        ("bob", tmp_path, ["down"], f"run {run_id!r} belongs to 'ada', and you are 'bob'"),
        ("ada", tmp_path, ["down"], "1 run is active, and nothing was ended"),
        ("ada", tmp_path, ["delete", run_id, "--yes"], f"run {run_id!r} is active"),
        ("ada", elsewhere, ["cancel", run_id], f"nobody works on run {run_id!r}"),
        ("ada", elsewhere, ["resume", run_id], f"is taken by {tmp_path / run_id}, and active"),
    ):
        code, out, error = edit_ray_as(owner, root, *command)
        assert (code, says in error) == (2, True), (command, out, error)
    assert run_id in edit_ray_as("ada", tmp_path, "down")[1]
    assert run_id not in edit_ray_as("bob", tmp_path, "list")[1]
    assert f"{run_id}  running" in edit_ray_as("bob", tmp_path, "list", "--all")[1]
    assert f"{run_id}  open" in edit_ray_as("ada", elsewhere, "list")[1]
    assert client.status(run_id).state == "running"
    assert pids() == before
    assert edit_ray_as("bob", tmp_path, "cancel", run_id, "--force")[0] == 0
    wait_until(lambda: client.status(run_id).state == "cancelled")


def test_down_ends_the_actors_the_next_run_starts_them_again_and_idle_they_end_themselves(
    ray_head, config, tmp_path, run_id
):
    client = LongVideoClient(output=tmp_path)
    list(client.stream(client.submit(config(segments=1), run_id=f"{run_id}-before"), frames=False))
    before = pids()
    assert (tmp_path / TARGETS).exists()
    command = [sys.executable, "-m", "edit_ray.cli", "down"]
    said = subprocess.run(command, env=ray_head, text=True, capture_output=True, check=True).stdout
    assert all(name in said for name in before)
    assert not (tmp_path / TARGETS).exists(), "Prometheus would find nobody there"
    wait_until(lambda: not any(_alive(pid) for pid in before.values()))
    idle = load_config(config(segments=1), ["engine.idle_exit_s=2"])
    list(client.stream(client.submit(idle, run_id=f"{run_id}-after"), frames=False))
    after = pids()
    assert not set(before.values()) & set(after.values())
    assert (tmp_path / TARGETS).exists()
    wait_until(lambda: launch.find_segment_scheduler() is None, 20)
    wait_until(lambda: not any(_alive(pid) for pid in after.values()), 20)
    wait_until(lambda: all(group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()), 20)
    assert not (tmp_path / TARGETS).exists()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] != "Z"
