"""What dies in a run on Ray, and how it goes on: same frames, every segment once, nothing left over."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from edit_ray import LongVideoClient
from edit_ray.actors import launch
from edit_ray.cli.main import main
from edit_ray.config import load_config
from edit_ray.engine.continuity import load_latents
from edit_ray.errors import ConfigError, SegmentFailed
from jobs.long_video import check_resumable
from tests.ray.conftest import REPOSITORY, manifest_of, pids, wait_until


def files_of(root, run_id):
    """All latents and the bytes of the whole video."""
    latents = [load_latents(path) for path in sorted((root / run_id / "latents").iterdir())]
    return np.concatenate(latents, axis=2), (root / run_id / "final.mp4").read_bytes()


def same(one, other):
    return np.array_equal(one[0], other[0]) and one[1] == other[1]


def test_a_killed_segment_scheduler_goes_on_by_itself(ray_head, config, tmp_path, run_id):
    """Three clients, of which one is slow and one begins late, see every segment once, whatever dies meanwhile."""
    client = LongVideoClient(output=tmp_path)
    path = load_config(config(steps=40, segments=5), ["engine.max_ahead=1"])  # it cannot end before both kills
    whole = client.submit(path, run_id=f"{run_id}-whole")
    list(client.stream(whole, frames=False))
    hurt = client.submit(path, run_id=f"{run_id}-hurt")
    quick, slow, seen = client.stream(hurt, frames=False), client.stream(hurt), []
    before = pids()
    for segment in quick:
        seen.append(segment.index)
        if segment.index in (0, 2):
            os.kill(pids()[launch.SCHEDULER], signal.SIGKILL)
    assert seen == [0, 1, 2, 3, 4]
    assert [segment.index for segment in slow] == [0, 1, 2, 3, 4]

    async def late():
        return [segment.index async for segment in client.stream(hurt, 3, frames=False)]

    assert asyncio.run(late()) == [3, 4]
    assert same(files_of(tmp_path, whole), files_of(tmp_path, hurt))
    assert manifest_of(tmp_path / hurt).incarnation == 3
    after = pids()
    assert after[launch.DENOISER] == before[launch.DENOISER], "the living GPU actor was adopted"
    assert after[launch.CACHE_STORE] == before[launch.CACHE_STORE]


def test_a_stopped_segment_scheduler_is_started_again_by_who_waits_for_it(ray_head, config, tmp_path, run_id):
    client, path = LongVideoClient(output=tmp_path, answer_timeout_s=2.0), config(segments=2)
    whole, hurt = (client.submit(path, run_id=f"{run_id}-{name}") for name in ("whole", "hurt"))
    list(client.stream(whole, frames=False))
    stopped = pids()[launch.SCHEDULER]
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert [segment.index for segment in client.stream(hurt, frames=False)] == [0, 1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert same(files_of(tmp_path, whole), files_of(tmp_path, hurt))
    assert client.status(hurt).state == "done"
    assert pids()[launch.SCHEDULER] != stopped


def test_a_run_whose_actors_were_all_ended_is_resumed_by_the_same_command(start_job, config, tmp_path, run_id):
    path, client = config(steps=40), LongVideoClient(output=tmp_path)
    command = ["--config", str(path), "--output", str(tmp_path), "--resume", "--run-id"]
    list(client.stream(client.submit(path, run_id=f"{run_id}-whole"), frames=False))
    job = start_job(*command, f"{run_id}-hurt")
    for line in job.stdout:
        if line.startswith("segment 0"):
            break
    launch.end_actors()
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1, said
    assert f"run `edit-ray resume {run_id}-hurt`" in said
    assert client.status(f"{run_id}-hurt").state == "open"
    with pytest.raises(SegmentFailed, match="nobody works on run"):
        list(client.stream(f"{run_id}-hurt", 1, frames=False))
    with pytest.raises(ConfigError, match=r"sampling\.seed is 4, and the run to resume has 3"):
        check_resumable(tmp_path / f"{run_id}-hurt" / "run.yaml", load_config(path, ["sampling.seed=4"]))
    again = start_job(*command, f"{run_id}-hurt")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert "resumed: segments 0 to " in said
    assert same(files_of(tmp_path, f"{run_id}-whole"), files_of(tmp_path, f"{run_id}-hurt"))


def test_the_command_line_extends_rerolls_and_watches(ray_head, config, tmp_path, run_id, capsys):
    def edit_ray(*arguments):
        return main(["--output", str(tmp_path), *arguments]), *capsys.readouterr()

    client = LongVideoClient(output=tmp_path)
    client.submit(config(segments=2), run_id=run_id)
    command = [sys.executable, "-m", "edit_ray.cli", "--output", str(tmp_path), "watch", run_id]
    watched = subprocess.run(command, cwd=REPOSITORY, env=ray_head, text=True, capture_output=True, check=False)
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.splitlines()[-1].startswith(f"{run_id}  done  2/2 segments")
    assert edit_ray("extend", run_id, "--segments", "1")[0] == 0
    assert edit_ray("watch", run_id)[1].splitlines()[-1].startswith(f"{run_id}  done  3/3")
    code, _, error = edit_ray("reroll", run_id, "--from", "3")
    assert (code, "--from is 3; it must be a segment" in error) == (2, True), error
    assert edit_ray("reroll", run_id, "--from", "2", "--seed", "9")[0] == 0
    wait_until(lambda: client.status(run_id).state == "done")
    manifest = manifest_of(tmp_path / run_id)
    assert [(record.index, record.take) for record in manifest.segments] == [(0, 0), (1, 0), (2, 1)]
    assert [(record.index, record.take) for record in manifest.earlier_takes] == [(2, 0)]
    assert edit_ray("resume", run_id)[1].startswith(f"{run_id}  done  3/3 segments")
    listed = edit_ray("list")[1].splitlines()
    assert any(line.startswith(f"{run_id}  done  3/3 segments") for line in listed)
    assert json.loads((tmp_path / run_id / "manifest.jsonl").read_text().splitlines()[0])["run_id"] == run_id
