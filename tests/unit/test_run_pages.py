"""A finished run in the browser: `edit-ray serve` as a process, and `edit-ray report`."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from edit_ray.cli.main import main
from edit_ray.testing import save_random_wan
from tests.runs_here import config_for
from tests.unit.test_actors import generate
from tests.unit.test_cache_report import Page


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the run `one`: two segments, each with a prompt of its own."""
    root = tmp_path_factory.mktemp("runs")
    model = save_random_wan(tmp_path_factory.mktemp("model") / "wan", expand_timesteps=True)
    prompts = [{"segment": 0, "prompt": "a red circle"}, {"segment": 1, "prompt": "a blue square"}]
    status, _, _ = asyncio.run(generate(root, config_for(model, video={"num_segments": 2}, prompt_segments=prompts)))
    assert status.state == "done", status.error
    return root


def get(url):
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read()


def test_a_run_is_served_until_the_keyboard_says_so(root):
    command = [sys.executable, "-m", "edit_ray.cli", "--output", str(root), "serve", "one", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            url = (server.stdout.readline() if "hls.js" in line else line).strip()
            assert url.startswith("http://127.0.0.1:")
            status = json.loads(get(url + "status"))
            assert get(url + status["playlist"]).endswith(b"#EXT-X-ENDLIST\n")
            assert get(url + "stream.mp4") == (root / "one" / "stream.mp4").read_bytes()
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(url + "run.yaml")
            port = url.rstrip("/").rpartition(":")[2]
            assert main(["--output", str(root), "serve", "one", "--port", port]) == 2, "the port is taken"
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert server.stderr.read() == ""
    assert status | {"playlist": None} == {
        "run_id": "one",
        "state": "done",
        "error": None,
        "committed": 2,
        "num_segments": 2,
        "final": "final.mp4",
        "playlist": None,
        "prompts": [{"start_s": 0, "prompt": "a red circle"}, {"start_s": 9 / 16, "prompt": "a blue square"}],
    }


def test_a_runs_report_has_its_frames_times_and_joins(root, capsys):
    assert main(["--output", str(root), "report", "one"]) == 0
    page = Page((root / "one" / "report.html").read_text())
    assert capsys.readouterr().out == f"{root / 'one' / 'report.html'}\n"
    assert len(page.all("img")) == 4, "two frames of each segment"
    assert all(text in page.text for text in ("Who worked when", "Seams and drift", "a blue square", "history_latents"))
    assert "What the cache decided" not in page.text, "there was no cache"
    shutil.copytree(root / "one", root / "two")
    (root / "two" / "segments" / "00000-t0.m4s").unlink()
    assert main(["--output", str(root), "report", str(root / "two")]) == 0
    assert len(Page((root / "two" / "report.html").read_text()).all("img")) == 2, "what was dropped is left out"
    (root / "two" / "segments" / "00001-t0.m4s").write_bytes(b"damaged")
    assert main(["--output", str(root), "report", "two"]) == 2
    assert "00001-t0.m4s cannot be read" in capsys.readouterr().err
