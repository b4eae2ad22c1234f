"""How runs are told of on the command line; what the commands do is tested on Ray."""

import subprocess
import sys
import time
from threading import Event

import pytest

from edit_ray.actors.messages import Progress, RunStatus
from edit_ray.cli import follow_run
from edit_ray.cli.follow_run import description_of, live_bar, steps_of
from edit_ray.cli.main import parser
from edit_ray.cli.run_commands import line_of
from edit_ray.errors import UnknownRun
from tests.documented import ROOT


def status(**changes):
    values = {"run_id": "mine", "state": "running", "path": "/runs/mine", "committed": 3, "num_segments": 8}
    return RunStatus(**values | {"num_frames": 201, "height": 128, "width": 128, "fps": 16} | changes)


def test_a_run_in_a_line():
    assert line_of(status()) == "mine  running  3/8 segments  /runs/mine"
    assert line_of(status(num_segments=None, num_frames=None)) == "mine  running  3/∞ segments  /runs/mine"


def test_progress_counts_steps_and_never_goes_back_behind_what_is_committed():
    at = Progress("mine", 4, 12, 30)
    assert steps_of(status(progress=at)) == (4 + 12 / 30, 8)
    assert steps_of(status()) == (3, 8)
    assert steps_of(status(progress=Progress("mine", 1, 0, 30), num_segments=None)) == (3, None)
    assert description_of(status(progress=at)) == "mine running: 3/8 segments, segment 4 step 12/30"
    assert description_of(status(state="paused")) == "mine paused: 3/8 segments"


def test_a_terminal_shows_a_bar_and_what_fails_in_it_ends_nothing(monkeypatch, capsys):
    class Client:
        asked = Event()

        def status(self, run_id):
            if self.asked.is_set():
                raise UnknownRun(run_id)
            self.asked.set()
            return status(progress=Progress("mine", 4, 12, 30))

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(follow_run, "POLL_S", 0.01)
    monkeypatch.setenv("COLUMNS", "120")
    with live_bar(Client(), "mine"):
        assert Client.asked.wait(10)
        time.sleep(0.3)  # rich draws ten times a second
    assert "mine running: 3/8 segments, segment 4 step 12/30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("resume mine", {"run_id": "mine", "allow_different_hardware": False}),
        ("resume mine --allow-different-hardware", {"allow_different_hardware": True}),
        ("extend mine --segments 4", {"segments": 4}),
        ("reroll mine --from 2", {"start": 2, "seed": None, "prompt": None}),
        ("reroll mine --from 2 --seed 9 --prompt circle", {"start": 2, "seed": 9, "prompt": "circle"}),
        (
            "steer mine --from 3 --prompt circle --guidance-scale 7",
            {"start": 3, "prompt": "circle", "guidance_scale": 7},
        ),
        ("steer mine --seed 9", {"start": None, "prompt": None, "negative_prompt": None, "seed": 9}),
        ("pause mine --force", {"run_id": "mine", "force": True}),
        ("unpause mine", {"run_id": "mine", "force": False}),
        ("approve mine --segment 2", {"segment": 2}),
        ("approve mine", {"segment": None}),
        (
            "branch mine --at 2 --new-id its --num-segments 8",
            {"at": 2, "new_id": "its", "num_segments": 8, "seed": None},
        ),
        ("watch mine", {"run_id": "mine"}),
    ],
)
def test_the_commands_are_understood(line, wanted):
    options = vars(parser().parse_args(line.split()))
    assert {name: options[name] for name in wanted} == wanted


SAID_WITHOUT_TORCH = """
import sys
from edit_ray.cli.main import main
for line in sys.argv[1:]:
    print(main(line.split()), "torch" in sys.modules)
"""


def test_a_missing_file_is_said_before_torch_is_imported():
    """The import takes up to a quarter of a minute."""
    lines = [
        "tune --config configs/tiny.yaml --psnr 30 --prompts /nowhere.txt",
        "tune --config /nowhere.yaml --psnr 30 --prompts README.md",
        "calibrate --policy teacache --file a.json --config /nowhere --prompts README.md",
    ]
    command = [sys.executable, "-c", SAID_WITHOUT_TORCH, *lines]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "2 False\n" * 3
    assert ["/nowhere" in line for line in done.stderr.splitlines()] == [True] * 3
