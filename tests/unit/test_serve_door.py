"""`edit-ray serve` without a run: what is refused before anything is started, and which runs it continues."""

import shutil
import sys

import pytest

from edit_ray.cli.main import main
from edit_ray.errors import ConfigError
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import Owner
from edit_ray.server import door
from edit_ray.server.models import models_of, offers_of
from edit_ray.server.token_file import TOKEN_VARIABLE, token_of
from tests.documented import ROOT
from tests.door_here import TOKEN, ClientHere, SchedulerHere, offer_of
from tests.runs_here import check_same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "--port is 0; it must be from 1 to 65535"),
        (["--port", "70000"], "--port is 70000"),
        (["--replicas", "0"], "--replicas is 0; it must be from 1 to 64"),
        (["--host", "0.0.0.0"], "--host is '0.0.0.0'; it must be 127.0.0.1 without a token"),
        (["--token-file", "nowhere"], "--token-file is 'nowhere', which cannot be read"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "a/x.yaml", "--config", "b/x.yaml"], "--config names 'x' twice"),
    ],
)
def test_mistakes_are_named_before_anything_is_started(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(door, "start", lambda *_: pytest.fail("it was started"))
    assert main(["--output", str(tmp_path), "serve", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_door_that_is_not_installed_is_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "edit_ray.server.door", None)
    monkeypatch.delattr("edit_ray.server.door")
    assert main(["--output", str(tmp_path), "serve"]) == 2
    assert "pip install 'edit_ray[serve]'" in capsys.readouterr().err


def test_a_token_comes_from_a_file_else_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert token_of(None) is None
    monkeypatch.setenv(TOKEN_VARIABLE, "x" * 20)
    assert token_of(None) == "x" * 20
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert token_of(tmp_path / "token") == TOKEN
    (tmp_path / "token").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="no UTF-8"):
        token_of(tmp_path / "token")


def test_models_have_the_names_of_their_files():
    (embedded,) = offers_of(models_of([]))
    assert (embedded.name, embedded.width_step, embedded.height_step) == ("tiny_wan", 16, 16)
    assert [name for name, _ in models_of([ROOT / "configs" / "tiny.yaml"])] == ["tiny"]


def test_runs_of_a_lost_cluster_are_continued_if_a_door_has_accepted_them(model, tmp_path):
    scheduler, config = SchedulerHere(), offer_of(model).base
    client = ClientHere(tmp_path / "made", scheduler)
    ids = {}
    for name, owner in (("mine", Owner("me", door.JOB)), ("job", Owner("me")), ("theirs", Owner("you", door.JOB))):
        client.owner = owner
        ids[name] = client.submit(config, run_id=name)
        list(client.stream(name, frames=False))
    lost = tmp_path / "lost"
    for name in ids:
        shutil.copytree(tmp_path / "made" / name, lost / name)
        lines = (lost / name / "manifest.jsonl").read_bytes().splitlines(keepends=True)
        (lost / name / "manifest.jsonl").write_bytes(lines[0])
        (lost / name / "final.mp4").unlink()
    scheduler.end()

    again = SchedulerHere()
    client = ClientHere(lost, again)
    client.owner = Owner("me", door.JOB)
    assert door.continue_runs(client) == ["mine"]
    list(client.stream("mine", frames=False))
    assert client.status("mine").state == "done"
    check_same(RunFolder(tmp_path / "made", "mine"), RunFolder(lost, "mine"))
    assert [client.status(name).state for name in ("job", "theirs")] == ["open", "open"]
    again.end()
