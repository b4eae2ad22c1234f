import contextlib
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from edit_ray.actors import launch
from edit_ray.client import LongVideoClient
from edit_ray.errors import EditRayError
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Manifest
from edit_ray.testing import save_random_wan

REPOSITORY = Path(__file__).resolve().parents[2]

CONFIG = """
model: {{path: "{model}"}}
sampling: {{height: 64, width: 64, num_frames: 17, num_inference_steps: {steps}, seed: 3}}
video: {{num_segments: {segments}}}
prompt_segments: [{{start: 0s, prompt: a red circle}}]
continuity: {{mode: history, history_latents: 2}}
engine: {{start_timeout_s: 60, cpu_threads: 1}}
"""
# One residual: [1, 5 * 4 * 4, 24] in float32, 2 pages; so the host tier holds two of the eight.
REUSE = """
cache: {policy: warmstart_reuse, inner: fbcache, rel_l1_thresh: 0.2, warm_steps: 4, reuse_window: 3}
store: {host_bytes: 16KiB, allow_tmpfs: true}
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", expand_timesteps=True)


@pytest.fixture
def config(model, tmp_path):
    """Writes a configuration of a tiny run and returns its path."""

    def write(steps: int = 4, segments: int = 4, more: str = "") -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(CONFIG.format(model=model, steps=steps, segments=segments) + more)
        return path

    return write


@pytest.fixture
def run_id(ray_head):
    """One that no other test of the session has used. What a test that failed has left at work goes on no further: it
    would keep the GPU actor from the next one.
    """
    name = f"test-{secrets.token_hex(4)}"
    yield name
    if launch.SCHEDULER in {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}:
        client = LongVideoClient()
        with contextlib.suppress(EditRayError):  # of other code, say
            for run in client.runs():
                if run.run_id.startswith(name) and not run.ended:
                    client.cancel(run.run_id)


@pytest.fixture(scope="session", autouse=True)
def _actors_end(ray_head):
    yield
    launch.end_actors()


@pytest.fixture
def spawn(ray_head):
    """Starts a Python process that reaches the session's Ray; whatever still runs at the test's end is ended."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=ray_head,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def start_job(spawn):
    """The job as a plain driver of its own."""
    return lambda *arguments: spawn(str(REPOSITORY / "jobs" / "long_video.py"), *arguments)


def typed(command, environment) -> subprocess.CompletedProcess[str]:
    """What comes of a command; once more while Ray's job agent, which comes up after everything else, is not there."""

    def done():
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=600, check=False
        )
        return None if "No available agent" in done.stderr else done

    return wait_until(done)


def manifest_of(folder: Path) -> Manifest:
    return RunFolder(folder.parent, folder.name).read_manifest()


def wait_until(condition, timeout_s: float = 60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{condition} did not come true within {timeout_s} s")


def pids() -> dict[str, int]:
    """Of the actors, once each is there: one that was killed is being started again."""
    actors = (launch.SCHEDULER, launch.DENOISER, launch.CACHE_STORE)
    return {name: wait_until(lambda name=name: pid_of(name)) for name in actors}


def pid_of(name: str) -> int | None:
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
        return ray.get(ray.get_actor(name, namespace="edit_ray").describe.remote())["pid"]
    return None
