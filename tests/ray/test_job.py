"""The job as a user runs it: submitted to Ray, as a plain driver, stopped, killed."""

import json
import os
import signal
import sys
import tempfile
import time

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.actors import launch
from edit_ray.cache.records import Record
from edit_ray.engine.continuity import load_latents
from edit_ray.metrics.exporter import TARGETS
from edit_ray.video.encode import read_frames
from tests.parity.test_seed_readme import CUSTOM_POLICY
from tests.ray.conftest import REPOSITORY, manifest_of, typed, wait_until

FRAMES = 17 + 3 * 4 * (5 - 2)


def ray_job_submit(environment, *arguments):
    return typed([os.path.join(os.path.dirname(sys.executable), "ray"), "job", "submit", *arguments], environment)


def latents_of_the_library(model):
    torch.set_num_threads(1)
    pipe = EditWanPipeline.from_pretrained(model)
    seeded = {"generator": torch.Generator().manual_seed(3), "output_type": "latent", "guidance_scale": 4.0}
    return pipe("a red circle", "", height=64, width=64, num_frames=17, num_inference_steps=4, **seeded).frames


def test_a_policy_of_an_installed_package_runs_in_the_job(ray_head, config, tmp_path, run_id):
    """The policy of the README of the system we come from, as printed, found through its package's entry point."""
    package = tmp_path / "site" / "mine-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[edit_ray.policies]\nmy_policy = my_policies:MyPolicy\n")
    (package.parent / "my_policies.py").write_text(CUSTOM_POLICY.replace("edit.cache", "edit_ray.cache"))
    launch.end_actors()  # those that live were started without the package
    environment = json.dumps({"env_vars": {"PYTHONPATH": str(package.parent)}})
    job = ["python", "jobs/long_video.py", "--config", str(config()), "--output", str(tmp_path), "--run-id", run_id]
    options = ["--set", "cache.policy=my_policy", "--set", "cache.rel_l1_thresh=100"]
    done = ray_job_submit(ray_head, "--runtime-env-json", environment, "--", *job, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cache: my_policy skipped 75% of the steps" in done.stdout
    record = Record.from_json((tmp_path / run_id / "records" / "00003-t0.json").read_text())
    assert record.mask("cond") == record.mask("uncond") == [True, False, False, False]
    segments = manifest_of(tmp_path / run_id).segments
    assert [segment.statistics["units_skipped"] for segment in segments] == [6.0] * 4


def test_ray_job_submit_with_a_working_dir(ray_head, config, model, tmp_path, run_id):
    job = ["python", "jobs/long_video.py", "--config", str(config()), "--output", str(tmp_path), "--run-id", run_id]
    done = ray_job_submit(ray_head, "--working-dir", ".", "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr
    assert len(read_frames(tmp_path / run_id / "final.mp4", height=64, width=64)) == FRAMES
    first = load_latents(tmp_path / run_id / "latents" / "00000-t0.safetensors")
    assert torch.equal(first, latents_of_the_library(model)), "segment 0 is the library's"
    log = [line for line in done.stdout.splitlines() if line.startswith("output: ")]
    assert log == [f"output: {tmp_path}", f"output: {tmp_path}/{run_id}/final.mp4"]
    assert f"'{manifest_of(tmp_path / run_id).begun.job}'" in done.stdout, "the submission is recorded"


def test_sigterm_stops_the_run_and_the_driver_within_two_seconds(start_job, config, tmp_path, run_id):
    path = config(steps=400)
    job = start_job("--config", str(path), "--output", str(tmp_path), "--run-id", run_id)
    for line in job.stdout:
        if line.startswith("run: "):
            break
    started = time.monotonic()
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 130
    assert time.monotonic() - started < 2.0
    wait_until(lambda: manifest_of(tmp_path / run_id).state == "cancelled")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_ray_of_the_job_s_own_leaves_prometheus_no_target(spawn, config, tmp_path, run_id, stopped):
    """Sockets of Ray lie below its folder, so its path has to be short."""
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp") as temp:
        script = "import os, sys; del os.environ['RAY_ADDRESS']; os.environ['RAY_TMPDIR'] = sys.argv[1]; "
        script += "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        options = ["--config", str(config(steps=400 if stopped else 4)), "--output", str(tmp_path), "--run-id", run_id]
        options += ["--set", "engine.start_timeout_s=200"]
        job = spawn("-c", script, temp, str(REPOSITORY / "jobs" / "long_video.py"), *options)
        said = []
        for line in job.stdout:
            said.append(line)
            if line.startswith("run: ") and stopped:
                assert (tmp_path / TARGETS).exists()
                job.send_signal(signal.SIGINT)
        assert job.wait(60) == (130 if stopped else 0), "".join(said)
    assert not (tmp_path / TARGETS).exists()
    if stopped:
        assert f"continue with `edit-ray --output {tmp_path} resume {run_id}`" in said[-1]


def test_a_gpu_that_is_not_there_is_said_to_be_missing(start_job, config, tmp_path, run_id):
    path = config(more="")
    changes = ["--set", "model.device=cuda", "--set", "engine.start_timeout_s=2"]
    job = start_job("--config", str(path), "--output", str(tmp_path), "--run-id", run_id, *changes)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1, said
    assert "GPU" in said
    assert "Traceback" not in said
    assert not (tmp_path / run_id).exists()
