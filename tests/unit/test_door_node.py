"""OpenAI's client for Node, as it is, against the HTTP door."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from edit_ray.page.run_server import HLS_JS
from tests.door_here import PROMPT, serving
from tests.unit import chromium

MODULES = HLS_JS.parents[2]


def asked_by_node(*arguments):
    """What the client got, told where the door is, a prompt, and a key if it needs one."""
    chromium.require("node", shutil.which("node") is not None, "node is not installed")
    chromium.require("openai", (MODULES / "openai").is_dir(), "OpenAI's client for Node is not installed: make page")
    command = ["node", str(Path(__file__).with_name("door_node.mjs")), str(MODULES), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_create_poll_content(model, tmp_path):
    with serving(model, tmp_path) as address:
        got = asked_by_node(f"{address}v1", PROMPT)
    video = got["video"]
    assert got["begun"] in ("queued", "in_progress")
    assert (video["status"], video["progress"], video["size"], video["seconds"]) == ("completed", 100, "48x32", "1.125")
    final = (tmp_path / video["id"] / "final.mp4").read_bytes()
    assert got["content"] == hashlib.sha256(final).hexdigest()
    assert got["refused"] == [404, "video_not_found"]
