"""`edit-ray serve` as the documentation prints it, with OpenAI's client as it is."""

import contextlib
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray import serve

from edit_ray.actors import launch
from edit_ray.runs.folder import RunFolder
from jobs.demo import free_port
from tests.documented import DOOR, ROOT, blocks, replaced, run_by, run_code
from tests.door_here import TOKEN
from tests.ray.conftest import CONFIG, wait_until

PAGE = "docs/http.md"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")]


@contextmanager
def served(command, environment, folder):
    """The URL that the command prints."""
    names = {"configs/tiny.yaml": str(folder / "tiny.yaml"), "0.0.0.0": "127.0.0.1", "token": str(folder / "token")}
    words = [*replaced(command, names), "--port", str(free_port()), "--output", str(folder / "runs")]
    with subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as process:
        try:
            yield next(line for line in process.stdout if line.startswith("http")).strip()
        finally:
            process.terminate()
        process.wait(60)


SERVED = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: edit_ray
    import_path: edit_ray.server.application:app
    route_prefix: /
    args:
      configs: [{folder}/tiny.yaml]
      overrides: [sampling.seed=3]
      output: {folder}/runs
      port: {port}
      token_file: {folder}/token
    deployments:
      - {{name: Door, num_replicas: 2}}
"""


class ServeRun:
    """`serve run` with a configuration, as KubeRay's RayService has one."""

    def __init__(self, environment, folder):
        self._port = free_port()
        (folder / "serve.yaml").write_text(SERVED.format(port=self._port, folder=folder))
        program = Path(sys.executable).with_name("serve")
        self._process = subprocess.Popen([program, "run", folder / "serve.yaml"], cwd=ROOT, env=environment)
        wait_until(self._is_up, 120)

    def _is_up(self):
        assert self._process.poll() is None
        with contextlib.suppress(OSError):
            return self.ask("GET", "/healthz")["status"] == "ok"

    def ask(self, method, path, body=None):
        about = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", data, about, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def completed(self, video_id):
        return wait_until(lambda: self.ask("GET", f"/v1/videos/{video_id}")["status"] == "completed", 120)

    def end(self):
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        serve.shutdown()


def test_serve_builds_a_door_that_continues_the_runs_of_a_lost_cluster(ray_head, model, tmp_path):
    launch.end_actors()
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(model=model, steps=2, segments=2))
    (tmp_path / "token").write_text(TOKEN)
    first = ServeRun(ray_head, tmp_path)
    try:
        video = first.ask("POST", "/v1/videos", {"prompt": "a red circle"})
        assert first.completed(video["id"])
    finally:
        first.end()
    launch.end_actors()
    folder = RunFolder(tmp_path / "runs", video["id"])
    made = folder.final.read_bytes()
    begun, *_ = folder.manifest.read_bytes().splitlines(keepends=True)
    folder.manifest.write_bytes(begun)  # as if nothing of it had been committed when the cluster was lost
    folder.final.unlink()
    again = ServeRun(ray_head, tmp_path)
    try:
        assert again.completed(video["id"]), "nobody has asked for it"
        assert folder.final.read_bytes() == made
    finally:
        again.end()


def test_the_page_about_http(ray_head, model, tmp_path, capsys):
    launch.end_actors()
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(model=model, steps=2, segments=2))
    (tmp_path / "token").write_text(TOKEN)
    plain, guarded = [command for _, command in run_by(DOOR)]
    with served(plain, ray_head, tmp_path) as url:
        (block,) = blocks(PAGE, "python")
        (of_readme,) = (found.code for found in blocks("README.md", "python") if "OpenAI" in found.code)
        assert block.code.startswith(of_readme), "the page begins with what the README has"
        names = {"http://127.0.0.1:8642/": url, '"video.mp4"': repr(str(tmp_path / "video.mp4")), '"4"': '"1"'}
        left = run_code(PAGE, [block.code], names)
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    assert capsys.readouterr().out.startswith("completed [")
    assert [path.name for path in (tmp_path / "runs").glob("20*")] == [left["video"].id]
    with served(guarded, ray_head, tmp_path) as url:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}v1/models", timeout=30)
        asked = urllib.request.Request(f"{url}v1/models", headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert b'"tiny_wan"' in answer.read()
