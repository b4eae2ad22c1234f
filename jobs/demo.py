"""`make demo`: starts a private Ray head, submits one job, prints its log and the video's path, ends that Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 60.0


def main(arguments: Sequence[str]) -> int:
    """Passes `arguments` to the job."""
    print("starting a private Ray: some ten seconds", flush=True)
    with tempfile.TemporaryDirectory(prefix="edit_ray_") as temp, private_ray(Path(temp)) as environment:
        print("submitting jobs/long_video.py: its first lines take some ten seconds more", flush=True)
        submit = [str(BIN / "ray"), "job", "submit", "--", "python", "jobs/long_video.py", *arguments]
        code = _submit(submit, environment)
        # Removes the scrape target of a Prometheus.
        down = [sys.executable, "-m", "edit_ray.cli", "down", "--force"]
        subprocess.run(down, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, check=False)
        return code


def _submit(command: list[str], environment: dict[str, str]) -> int:
    """Submits the job and prints its log; retries while Ray's job agent is not up yet."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        job = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert job.stdout is not None
        rays_own = _show_log(job.stdout)
        code = job.wait()
        if "submitted successfully" in rays_own:
            return code
        if time.monotonic() > deadline:
            print(rays_own, end="")
            return code
        time.sleep(0.5)


def _show_log(lines: Iterable[str]) -> str:
    """Prints the job's own lines as they arrive; returns the output of Ray's command around them."""
    rays_own, jobs_turn = [], False
    for line in lines:
        if jobs_turn and "WebSocket closed for job" not in line:
            print(line, end="", flush=True)
        else:
            rays_own.append(line)
            jobs_turn = line.startswith("Running entrypoint for job")
    return "".join(rays_own)


@contextlib.contextmanager
def private_ray(temp: Path) -> Iterator[dict[str, str]]:
    """A private Ray head on loopback with its own token; yields the environment to reach it."""
    gcs, dashboard, agent = free_ports(3)
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",  # jobs run `python` from the PATH of `ray start`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (temp / "head.log").open("w") as log:
        head = subprocess.Popen(
            [
                *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={temp}"),
                *("--node-ip-address=127.0.0.1", f"--port={gcs}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                # Another Ray on this machine may hold the default port, without which no job can be submitted.
                f"--dashboard-agent-listen-port={agent}",
            ],
            cwd=REPOSITORY,
            env={name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_dashboard(head, dashboard, temp / "head.log")
        yield environment
    finally:
        _end(head)


def _await_dashboard(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    sys.exit(f"Ray did not start within {START_TIMEOUT_S:g} s; its output:\n{log.read_text()}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """Ends the head, then the rest of its process group."""
    head.send_signal(signal.SIGINT)  # on SIGTERM it would wait for its actors first
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def free_ports(number: int) -> list[int]:
    """So many ports on loopback that nobody has, no two alike."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """A port on loopback that nobody has."""
    return free_ports(1)[0]


if __name__ == "__main__":
    if shutil.which("ray", path=str(BIN)) is None:
        sys.exit("there is no `ray` beside this python; run `make demo`, which makes the virtual environment")
    sys.exit(main(sys.argv[1:]))
