"""The job's command line, up to where Ray would begin."""

import subprocess
import sys
from pathlib import Path

import pytest

from edit_ray.config import load_config
from jobs import long_video

REPOSITORY = Path(__file__).resolve().parents[2]


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "jobs" / "long_video.py"), *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=False, cwd="/")


def test_the_printed_configuration_is_a_whole_one(tmp_path):
    done = job("--print-config", "--set", "sampling.seed=7")
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout)
    printed = load_config(tmp_path / "printed.yaml")
    assert printed.sampling.seed == 7
    assert "disk_bytes: null" in done.stdout or "directory: null" in done.stdout
    assert printed == load_config(REPOSITORY / "configs" / "tiny.yaml", ["sampling.seed=7"])


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
        (["--set", "sampling.heihgt=64"], ["sampling.heihgt", "sampling.height"]),
        (["--set", "sampling.num_frames=34", "--set", "engine.segment_retries=-1"], ["num_frames", "segment_retries"]),
        (["--set", "prompt_segments.0.prompt=a purple dragon"], ["dragon", "knows: a, an,", "yellow, ',', '.'."]),
        (["--set", "model.path=nobody"], ["nobody", "folder", "hub id"]),
        (["--run-id", "../up"], ["run id", "../up"]),
        (["--output", "/dev/null/x"], ["/dev/null/x"]),
        (["--set", "model.torch_dtype=float16", "--set", "model.device=cpu"], ["float16", "bfloat16"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_a_sentence(arguments, words):
    done = job(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines
    assert all(any(word in line for line in lines) for word in words), done.stderr


def test_nothing_that_others_wrote_is_obeyed_by_a_terminal(monkeypatch, capsys, tmp_path):
    """Such as the prompts that it shows with each segment."""
    monkeypatch.setattr(long_video, "_run", lambda *_: print("segment 0 | \x1b]0;owned\x07\x1b[2J\u202e") or 0)
    assert long_video.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "segment 0 | \\x1b]0;owned\\x07\\x1b[2J\\u202e\n"
