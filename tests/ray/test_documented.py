"""The commands of README and docs about runs, one after the other as they are printed, on a Ray that is there."""

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from edit_ray import LongVideoClient
from edit_ray.actors import launch
from tests.documented import ON_RAY, replaced, run_by
from tests.ray.conftest import REPOSITORY, typed, wait_until

# So that a run takes seconds on a CPU.
SMALLER = (
    "--set sampling.height=32 --set sampling.width=32 --set sampling.num_frames=17 --set sampling.num_inference_steps=2"
)


class Shell:
    """Carries out commands as a user would who types them, and waits until what they have begun has ended."""

    def __init__(self, environment, root):
        self.root = root
        home, token = root.parent / "home", {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"}
        home.mkdir()
        self.environment = environment | {"EDIT_RAY_OUTPUT": str(root), "PYTHONPATH": str(REPOSITORY)}
        self.elsewhere = {name: value for name, value in environment.items() if name not in token} | {"HOME": str(home)}
        self.run_id = ""

    def carry_out(self, command):
        """What the command has said, after it has ended with 0."""
        names = {
            "jobs/long_video.py": f"jobs/long_video.py --output {self.root} {SMALLER}",
            "RUN": self.run_id,
            "20261123-101500-3f2a": self.run_id,
        }
        words = replaced(command, names)
        if words[:2] == ["edit-ray", "serve"]:
            return self._served([*words, "--port", "0"])
        done = typed(words, self.elsewhere if "get-auth-token" in words else self.environment)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        if "--no-wait" in words:
            wait_until(lambda: words[-1] in typed(["edit-ray", "list"], self.environment).stdout)
        elif "submit" in words:
            self.run_id = re.search(r"^run: (\S+),", done.stdout, re.MULTILINE)[1]
        if {"resume", "extend", "reroll"} & set(words):
            client = LongVideoClient(output=self.root)
            wait_until(lambda: client.status(self.run_id).ended)
            assert client.status(self.run_id).state == "done"
        return done.stdout + done.stderr

    def _served(self, words):
        with subprocess.Popen(words, env=self.environment, text=True, stdout=subprocess.PIPE) as served:
            try:
                url = next(line for line in served.stdout if line.startswith("http")).strip()
                with urllib.request.urlopen(url, timeout=30) as answer:
                    return answer.read().decode()
            finally:
                served.terminate()


@pytest.mark.slow
def test_the_commands_of_runs(ray_head, tmp_path):
    launch.end_actors()  # those that live have another model
    shell, said = Shell(ray_head, tmp_path / "runs"), {}
    for page, command in run_by(f"{ON_RAY}::test_the_commands_of_runs"):
        said.setdefault(command, []).append(shell.carry_out(command))
        print(page, command, said[command][-1], sep="\n")
    launch.end_actors()
    assert all(text.strip() for texts in said.values() for text in texts)
    assert all(
        "final.mp4" in text for command, texts in said.items() for text in texts if command.endswith("long_video.py")
    )


@pytest.mark.slow
def test_the_demo(tmp_path):
    """What `make demo` runs, which starts a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    done = subprocess.run(
        [sys.executable, "jobs/demo.py"],
        cwd=REPOSITORY,
        env=environment | {"EDIT_RAY_OUTPUT": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("starting a private Ray: some ten seconds\n"), "what takes long says so first"
    (path,) = re.findall(r"^output: (\S+final\.mp4)$", done.stdout, re.MULTILINE)
    assert Path(path).is_file()
    assert re.search(r"^cache: .* skipped \d+% of the steps$", done.stdout, re.MULTILINE)
    assert re.search(r"^reuse: [1-9]\d* residuals stored and [1-9]\d* read", done.stdout, re.MULTILINE)
