"""README's job, typed in a home of its own, on a Ray that its user has started: with Ray's token, and without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.demo import free_port, free_ports
from tests.documented import commands
from tests.ray.conftest import REPOSITORY, typed, wait_until

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SMALLER = [f"--set=sampling.{name}" for name in ("height=32", "width=32", "num_frames=17", "num_inference_steps=2")]
SAYS_HOW, START = ["export RAY_AUTH_MODE=token", "ray get-auth-token --generate"], "ray start --head"
JOB = "ray job submit -- python jobs/long_video.py"


@pytest.fixture
def home(tmp_path):
    """The environment of a user who has never run Ray, and who sees no other Ray of this machine."""
    (tmp_path / "home").mkdir()
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDIT_RAY_"))}
    return mine | {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_ADDRESS": f"127.0.0.1:{free_port()}",
        "PYTHONPATH": str(REPOSITORY),
    }


@pytest.fixture
def start(home, tmp_path):
    """Starts Ray as `ray start --head` does, in the given environment, on ports that nobody has."""
    heads = []

    def begin(environment):
        port = home["RAY_ADDRESS"].rpartition(":")[2]
        dashboard, agent = free_ports(2)
        places = {"port": port, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
        command = [*START.split(), "--block", f"--temp-dir=/tmp/er-{port}", *(f"--{k}={v}" for k, v in places.items())]
        without_address = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        with (tmp_path / "head.log").open("w") as log:
            heads.append(subprocess.Popen(command, env=without_address, stdout=log, stderr=log, start_new_session=True))
        wait_until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text())

    yield begin
    for head in heads:
        os.killpg(head.pid, 2)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, 9)
            head.wait()


def said(words, environment):
    done = typed(words, environment)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("has_token", [True, False], ids=["a token is there", "no token yet"])
def test_readme_job(home, start, tmp_path, has_token):
    lines = commands("README.md")
    begin = lines.index(SAYS_HOW[0])
    assert lines[begin : begin + 4] == [*SAYS_HOW, START, JOB]
    if has_token:
        said(SAYS_HOW[1].split(), home)
    exported = home | {"RAY_AUTH_MODE": "token"}
    said(SAYS_HOW[1].split(), exported)
    start(exported)
    done = said([*JOB.split(), f"--output={tmp_path}", *SMALLER], exported)
    run_id = re.search(r"^run: (\S+),", done, re.MULTILINE)[1]
    assert (tmp_path / run_id / "final.mp4").is_file()
    # Our own commands find the token by themselves.
    assert run_id in said(["edit-ray", "--output", str(tmp_path), "list"], home)
    said(["edit-ray", "--output", str(tmp_path), "down"], home)


def test_a_token_in_the_home_is_no_hindrance_on_a_ray_without(home, start, tmp_path):
    said(SAYS_HOW[1].split(), home)
    disabled = home | {"RAY_AUTH_MODE": "disabled"}
    start(disabled)
    done = said([*JOB.split(), f"--output={tmp_path}", *SMALLER], disabled)
    assert re.search(r"^run: (\S+),", done, re.MULTILINE)[1] in said(["edit-ray", "list"], home)
    said(["edit-ray", "down"], home)
