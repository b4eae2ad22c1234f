"""`edit-ray` where no Ray runs: what lies on disk is listed, told, removed; nothing is started."""

import os
import threading
import time
from pathlib import Path

import pytest

from edit_ray.actors.messages import RunSpec
from edit_ray.cli.main import main
from edit_ray.config import config_of, dump_yaml
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Ended, Paused

CONFIG = config_of({"video": {"num_segments": 2}, "prompt_segments": [{"start": "0s", "prompt": "a red circle"}]})


@pytest.fixture(autouse=True)
def _no_ray(tmp_path, monkeypatch):
    """No Ray is to be found, and the fixture of all unit tests lets none be started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "no_ray"))
    monkeypatch.setenv("EDIT_RAY_OUTPUT", str(tmp_path / "runs"))
    monkeypatch.setenv("EDIT_RAY_OWNER", "ada")


def run_on_disk(root: Path, run_id: str, state: str | None = "done", owner: str = "ada") -> RunFolder:
    """A run that has ended, or with `state` None one that nobody works on."""
    spec = RunSpec(run_id, root, CONFIG, CONFIG.num_segments)
    manifest = spec.folder.create(dump_yaml(CONFIG), spec.begun("token", {}, owner))
    if state is not None:
        manifest.append(Ended(1, state))
    manifest.close()
    return spec.folder


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_list_names_the_runs_on_disk_and_says_where_none_is(tmp_path, capsys):
    root = tmp_path / "runs"
    assert told(capsys, "list") == (0, f"no runs in {root}\n", "")
    run_on_disk(root, "one")
    run_on_disk(root, "two", state=None)
    (root / "no-run").mkdir()
    (root / "damaged").mkdir()
    (root / "damaged" / "manifest.jsonl").write_text("{}\n")
    code, out, err = told(capsys, "list")
    total = CONFIG.num_segments
    assert out == f"one  done  0/{total} segments  {root}/one\ntwo  open  0/{total} segments  {root}/two\n"
    assert code == 0
    assert f"{root}/damaged is left out" in err


def test_a_folder_of_runs_may_be_named_behind_the_command(tmp_path, capsys):
    run_on_disk(tmp_path / "other", "one")
    for arguments in (("list", "--output"), ("--output",)):
        line = [*arguments, str(tmp_path / "other")]
        _, out, _ = told(capsys, *line, *([] if "list" in line else ["list"]))
        assert out.startswith("one  done"), arguments
    assert (
        told(capsys, "--output", str(tmp_path / "none"), "status", "one", "--output", str(tmp_path / "other"))[0] == 0
    )


def test_a_run_s_status_is_read_from_disk(tmp_path, capsys):
    run_on_disk(tmp_path / "runs", "one", state="failed")
    assert told(capsys, "status", "one")[1].startswith("one  failed  0/")
    code, _, err = told(capsys, "status", "nobody")
    assert (code, "no run 'nobody'" in err) == (2, True)


def test_list_shows_one_s_own_runs_and_those_of_nobody_unless_all_are_asked_for(tmp_path, capsys):
    for run_id, owner in (("mine", "ada"), ("old", ""), ("other", "bob")):
        run_on_disk(tmp_path / "runs", run_id, owner=owner)
    _, out, _ = told(capsys, "list")
    assert [line.split()[0] for line in out.splitlines()] == ["mine", "old", "1"]
    assert out.splitlines()[-1] == "1 more of other owners: --all shows them"
    _, out, _ = told(capsys, "list", "--all")
    assert [(line.split()[0], line.split()[-1]) for line in out.splitlines()] == [
        ("mine", "ada"),
        ("old", "nobody"),
        ("other", "bob"),
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["resume", "other"],
        ["extend", "other", "--segments", "2"],
        ["reroll", "other", "--from", "0"],
        ["steer", "other", "--seed", "1"],
        ["pause", "other"],
        ["unpause", "other"],
        ["approve", "other"],
        ["cancel", "other"],
        ["delete", "other", "--yes"],
    ],
)
def test_another_owner_s_run_is_left_alone(tmp_path, capsys, command):
    folder = run_on_disk(tmp_path / "runs", "other", state=None, owner="bob")
    code, _, err = told(capsys, *command)
    assert code == 2
    assert "run 'other' belongs to 'bob', and you are 'ada'" in err
    assert "--force" in err
    assert folder.read_manifest().incarnation == 1


@pytest.mark.parametrize("command", [["steer", "mine", "--seed", "1"], ["pause", "mine"], ["approve", "mine"]])
def test_a_run_that_nobody_works_on_is_not_steered(tmp_path, capsys, command):
    folder = run_on_disk(tmp_path / "runs", "mine", state=None)
    code, _, err = told(capsys, *command)
    assert (code, err) == (2, "edit-ray: nobody works on run 'mine'; run `edit-ray resume mine` first\n")
    run_on_disk(tmp_path / "runs", "old", state="done")
    code, _, err = told(capsys, command[0], "old", *command[2:])
    assert code == 2
    assert err.startswith("edit-ray: run 'old' has ended (done): `edit-ray reroll old --from K` makes segments again")
    assert folder.read_manifest().changes == ()


def test_what_a_run_waits_for_is_shown(tmp_path, capsys):
    folder = run_on_disk(tmp_path / "runs", "mine", state=None)
    file = folder.open()
    file.append(Paused(1, True))
    file.close()
    code, out, _ = told(capsys, "status", "mine")
    assert code == 0
    assert "paused: no further segment begins before `edit-ray unpause mine`" in out


def test_a_run_does_not_go_on_in_a_ray_that_would_end_with_the_command(tmp_path, capsys):
    folder = run_on_disk(tmp_path / "runs", "one", state=None)
    code, _, err = told(capsys, "resume", "one")
    assert code == 1
    assert "no Ray is running: start one with `ray start --head`" in err
    assert folder.read_manifest().incarnation == 1


def test_without_a_ray_nothing_is_started_or_stopped(tmp_path, capsys):
    assert told(capsys, "down") == (0, "no Ray is running\n", "")
    run_on_disk(tmp_path / "runs", "one", state="cancelled")
    assert told(capsys, "cancel", "one") == (0, "one has ended already: cancelled\n", "")
    run_on_disk(tmp_path / "runs", "two", state=None)
    code, _, err = told(capsys, "cancel", "two")
    assert (code, "nobody works on run 'two'" in err) == (2, True)


def test_watching_waits_for_a_run_that_is_about_to_begin(tmp_path, capsys):
    code, _, err = told(capsys, "watch", "late", "--wait", "0")
    assert (code, "no run 'late'" in err) == (2, True)
    run = run_on_disk(tmp_path / "elsewhere", "late").path
    job = threading.Timer(1.0, run.rename, [tmp_path / "runs" / "late"])  # at once, as it is never seen half made
    job.start()
    code, out, err = told(capsys, "watch", "late", "--wait", "60")
    job.join()
    assert (code, out.splitlines()[-1].startswith("late  done")) == (0, True)
    assert "waiting 60 s for it to start" in err


@pytest.mark.parametrize("state", ["failed", None])
def test_a_report_before_the_first_segment_says_so(tmp_path, capsys, state):
    run_on_disk(tmp_path / "runs", "one", state)
    code, _, err = told(capsys, "report", "one")
    assert (code, f"has committed no segment yet (its state: {state or 'open'})" in err) == (2, True)
    assert not (tmp_path / "runs" / "one" / "report.html").exists()


def test_a_run_is_deleted_with_what_its_segments_reuse(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from edit_ray.tiers.disk_tier import EntryFolder, aligned_buffer, memory_of

    root = tmp_path / "runs"
    spec = RunSpec.of(root, CONFIG, run_on_disk(root, "one", state=None).read_manifest())
    other = run_on_disk(root, "two", state=None)
    files = EntryFolder(root / ".cache_store", allow_tmpfs=True)
    for name in (spec.residuals_id, "of-another"):
        memory = memory_of(aligned_buffer(4096))
        assert files.write((name, 0), files.begin((name, 0))[0], memory, torch.float32, [4])
    files.close()
    code, _, err = told(capsys, "delete", "one")
    assert (code, "nothing was removed; --yes removes 1 run" in err) == (2, True)
    assert spec.folder.path.exists()
    code, out, _ = told(capsys, "delete", "one", "--yes")
    assert (code, f"removed {spec.folder.path}" in out) == (0, True)
    assert not spec.folder.path.exists()
    assert other.path.exists()
    left = EntryFolder(root / ".cache_store", allow_tmpfs=True).entries()
    assert [key[0] for key in left] == ["of-another"]
    assert told(capsys, "list")[1].startswith("two  open")
    assert [path.name for path in root.glob(".*deleted")] == []


def test_a_locked_run_is_not_deleted_and_one_of_an_unreadable_configuration_is(tmp_path, capsys):
    folder = run_on_disk(tmp_path / "runs", "one", state=None)
    folder.run_yaml.write_text("of: another version\n")
    held = folder.open()
    code, _, err = told(capsys, "delete", "one", "--yes")
    assert (code, "another process is working on the run" in err) == (1, True)
    assert folder.path.exists()
    held.close()
    assert told(capsys, "delete", "one", "--yes")[0] == 0
    assert not folder.path.exists()


def test_a_link_to_a_folder_elsewhere_is_not_followed(tmp_path, capsys):
    folder = run_on_disk(tmp_path / "elsewhere", "one")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(folder.path)
    code, _, err = told(capsys, "delete", "one", "--yes")
    assert (code, "is a link" in err) == (1, True)
    assert folder.read_manifest().state == "done"


def test_prune_removes_one_s_own_old_runs_in_the_states_asked_for(tmp_path, capsys):
    root, month = tmp_path / "runs", 31 * 86400
    for run_id, state, owner, age_s in (
        ("old-done", "done", "ada", month),
        ("old-failed", "failed", "ada", month),
        ("old-open", None, "ada", month),
        ("old-other", "done", "bob", month),
        ("new", "done", "ada", 3600),
    ):
        folder = run_on_disk(root, run_id, state, owner)
        os.utime(folder.manifest, (time.time() - age_s,) * 2)

    def left():
        return sorted(path.name for path in root.iterdir())

    assert told(capsys, "prune", "--older-than", "30d")[0] == 2  # nobody says yes
    assert len(left()) == 5
    assert told(capsys, "prune", "--older-than", "30d", "--state", "failed", "--yes")[0] == 0
    assert left() == ["new", "old-done", "old-open", "old-other"]
    assert told(capsys, "prune", "--older-than", "30d", "--yes")[0] == 0
    assert left() == ["new", "old-open", "old-other"]
    assert told(capsys, "prune", "--older-than", "30d", "--yes")[1] == "nothing to remove\n"
    code, _, err = told(capsys, "prune", "--older-than", "30", "--yes")
    assert (code, "--older-than is '30'" in err) == (2, True)


def test_an_unknown_command_names_the_nearest_and_the_version_is_printed(capsys):
    for given, meant in (("lst", "list"), ("statsu", "status"), ("dwon", "down")):
        with pytest.raises(SystemExit):
            main([given])
        assert f"{given!r} is unknown; did you mean {meant!r}?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("edit-ray ")


def test_runs_on_disk_are_told_where_the_ray_that_is_named_does_not_answer(tmp_path, capsys):
    run_on_disk(tmp_path / "runs", "one")
    for command, said in ((["list"], "one  done"), (["status", "one"], "one  done")):
        code, out, err = told(capsys, "--address", "127.0.0.1:1", *command)
        assert (code, out.startswith(said)) == (0, True)
        assert len(err.splitlines()) == 1
        assert "no Ray answers at 127.0.0.1:1" in err
    assert told(capsys, "--address", "127.0.0.1:1", "cancel", "one")[0] == 1


def test_doctor_asks_each_question_and_fails_with_a_problem(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    code, out, _ = told(capsys, "doctor", "--address", "127.0.0.1:1")
    said = {line.split(": ")[0].split(maxsplit=1)[1]: line for line in out.splitlines()}
    assert code == 1
    assert set(said) == {"gpu", "ffmpeg", "ray", "token", "shared memory", "output"}
    assert said["ray"].startswith("problem  ray: no Ray answers at 127.0.0.1:1")
    assert said["token"].startswith("warning  token: none")
    assert said["ffmpeg"].startswith("ok")
    assert str(tmp_path / "runs") in said["output"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    _, out, _ = told(capsys, "doctor", "--address", "http://127.0.0.1:8265")
    assert "problem  token: RAY_AUTH_MODE is token, and there is none" in out
    assert "which is Ray's dashboard" in out
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    assert "warning  token: others can read" in told(capsys, "doctor")[1]
    token.chmod(0o600)
    assert "ok       token: " in told(capsys, "doctor")[1]
    (tmp_path / "file").write_text("")
    code, out, _ = told(capsys, "doctor", "--output", str(tmp_path / "file"))
    assert (code, "problem  output: --output is" in out) == (1, True)
