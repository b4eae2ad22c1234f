"""`edit-ray serve` as the documentation prints it, with OpenAI's client as it is."""

import subprocess
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from edit_ray.actors import launch
from jobs.demo import free_port
from tests.documented import DOOR, ROOT, blocks, replaced, run_by, run_code
from tests.door_here import TOKEN
from tests.ray.conftest import CONFIG

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
