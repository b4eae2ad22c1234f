"""Every code block and command of README, docs and the pages beside them is run by a test, or named with a reason.

Those that need no Ray and no other page's names are run here; tests/documented.py says where the others are.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from typing import get_args

import pytest

from edit_ray.cache.records import Decision, Record
from edit_ray.cli.main import main
from edit_ray.runs.events import RunState
from edit_ray.testing import VARIANTS
from jobs.demo import free_port
from tests import documented
from tests.documented import HERE, MODEL_CARD, PAGES, ROOT, blocks, commands, replaced, run_by, run_code, runner_of
from tests.prometheus import need
from tests.unit.test_make_model import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYWHERE = [(page, command) for page in PAGES for command in commands(page)]


def of(name):
    return run_by(f"{HERE}::{name}")


def test_no_block_is_left_out():
    found = {(block.page, block.language) for page in PAGES for block in blocks(page)}
    assert {(page, language) for page, language in found if language not in documented.SHELL} == set(documented.BLOCKS)


def test_no_command_is_left_out():
    printed = {command for _, command in EVERYWHERE}
    run = {command for page, command in EVERYWHERE if runner_of(page, command) is not None}
    assert printed - run == documented.LEFT_OUT.keys()


def test_every_test_that_is_named_is_there_and_has_something_to_run():
    named = {test for _, _, test in documented.COMMANDS}.union(*documented.BLOCKS.values())
    for test in named:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test
    assert all(run_by(test) for _, _, test in documented.COMMANDS)


def test_the_drawings_name_what_is_there():
    tree, layers, states, _ = (block.code for block in blocks("docs/architecture.md", ""))
    folders = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    there = {path.name for path in (ROOT / "edit_ray").iterdir() if path.is_dir() and path.name[0] != "_"}
    (others,) = re.findall(r"^  (\w+(?:  \w+)+)$", tree, re.MULTILINE)
    assert there - {"config", "cli", "testing"} == set(folders)
    modules = {path.stem for path in (ROOT / "edit_ray").iterdir()} - {"__init__", "__pycache__", "py.typed"}
    assert modules - set(folders) == set(others.split())
    assert all((ROOT / folder).is_dir() for folder in re.findall(r"(\w+)/", tree.splitlines()[-1]))

    ruled = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    named = [set(re.findall(r"edit_ray\.(\w+)", layer)) for layer in ruled]
    words = [set(re.findall(r"\w+", line)) for line in layers.splitlines()]
    assert all(layer - {"testing"} <= line for layer, line in zip(named, words, strict=True))

    assert set(get_args(RunState)) - {"open"} <= set(re.findall(r"\w+", states))


@pytest.mark.parametrize(("page", "command"), of("test_a_quick_command_runs"))
def test_a_quick_command_runs(page, command, tmp_path, monkeypatch, capsys):
    """As it is printed, in a folder that has what stands before it; a made model has the sizes of a small one."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    decision = Decision(step=0, branch="cond", expert="transformer", unit=0, decision="compute", reason="policy")
    (tmp_path / "record.json").write_text(Record(1, 1, [decision]).to_json())
    monkeypatch.setitem(VARIANTS, "t2v-1.3B", SMALL)
    monkeypatch.chdir(tmp_path)
    assert main(replaced(command, {})[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


# Names for smaller ones, so that the command takes seconds on a CPU.
SMALLER = {
    "configs/tiny.yaml": f"{ROOT}/configs/tiny.yaml --set continuity.mode=none --set sampling.num_frames=5"
    " --set sampling.height=32 --set sampling.width=32 --set sampling.num_inference_steps=4",
    "edit-ray": f"{sys.executable} -m edit_ray.cli",
    **{
        f"python benchmarks/{name}.py": f"{sys.executable} {ROOT}/benchmarks/{name}.py --quick"
        for name in ("fast_forward", "skip_cost", "block_offload", "peak_memory")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), of("test_a_dear_command_runs"))
def test_a_dear_command_runs(page, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle on a black background\na blue square on a white background\n")
    words, environment = replaced(command, SMALLER), os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for option in ("--file", "--output"):
        if option in words:
            written = tmp_path / words[words.index(option) + 1]
            texts = written.read_text().splitlines() if written.suffix == ".jsonl" else [written.read_text()]
            assert all(json.loads(text) for text in texts)
            assert texts


@pytest.mark.slow
def test_the_code_of_the_model_card_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = blocks(MODEL_CARD, "python")
    names = run_code(MODEL_CARD, [block.code], {})
    assert names["video"].shape == (33, 128, 128, 3)


def test_an_install_says_first_that_it_takes_minutes(tmp_path):
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not under a `make`
    command = ["make", "--dry-run", "venv", f"VENV={tmp_path}/none"]
    done = subprocess.run(command, cwd=ROOT, env=alone, text=True, capture_output=True, check=True)
    assert done.stdout.startswith(f'echo "Making {tmp_path}/none: this takes some minutes the first time."')


@pytest.mark.slow
def test_it_is_installed_as_the_readme_says(tmp_path):
    """From a clone that git has made; what edit_ray needs is left out, as it takes minutes to download."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", f"file://{ROOT}", str(clone)], check=True)
    for _, command in of("test_it_is_installed_as_the_readme_says"):
        words = replaced(command, {"python3": sys.executable})
        if "install" in words:
            words[words.index("install") :] = ["install", "--no-deps", "--quiet", *words[words.index("install") + 1 :]]
        subprocess.run(words, cwd=clone, check=True, timeout=900)
        if "install" in words:
            shown = [str(clone / ".venv/bin/pip"), "show", "edit_ray"]
            assert "Name: edit_ray" in subprocess.run(shown, text=True, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_a_prometheus_is_started(tmp_path):
    """In a copy, as `make monitor` links the folder of runs into the clone."""
    need("prometheus")
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "monitoring" / "prometheus", tmp_path / "monitoring" / "prometheus", symlinks=True)
    at = f"127.0.0.1:{free_port()}"
    command = ["make", "monitor", f"RUNS={tmp_path / 'runs'}", f"PROMETHEUS={at}"]
    ready, log = f"http://{at}/-/ready", tmp_path / "log"
    with log.open("w") as out:
        started = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not answers(ready):
                assert started.poll() is None, log.read_text()
            pages = re.findall(rf"http://{at}/\S+", log.read_text())
            assert [url for url in pages if not answers(url)] == [], log.read_text()
        finally:
            os.killpg(started.pid, signal.SIGINT)
            started.wait(60)
    assert len(pages) == 3, log.read_text()


@pytest.mark.parametrize(("version", "below"), [("2.42.0+ds", "/classic"), ("2.53.4", ""), ("3.5.0", "")])
def test_the_pages_of_prometheus_are_named_as_its_build_has_them(tmp_path, version, below):
    """In the place of Prometheus is what only tells its version."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "monitoring" / "prometheus").mkdir(parents=True)
    program = tmp_path / "bin" / "prometheus"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 'prometheus, version {version} (branch: any)'\n")
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "monitor", f"RUNS={tmp_path / 'runs'}", "PROMETHEUS=host:9090"]
    told = subprocess.run(command, cwd=tmp_path, env=os.environ | path, text=True, capture_output=True, check=True)
    pages = re.findall(r"http://host:9090(\S*?/)(targets|alerts|graph)\b", told.stdout)
    assert pages == [(f"{below}/", name) for name in ("targets", "alerts", "graph")]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:
        time.sleep(0.05)
        return False
