"""A run's folder is there whole or not at all, and only its owner's."""

import os

import pytest

from edit_ray.errors import RunExists, RunLocked, UnknownRun
from edit_ray.runs.folder import RunFolder, publish, write_atomic
from tests.unit.test_manifest import BEGUN


def test_a_folder_is_made_whole(tmp_path):
    folder = RunFolder(tmp_path, "one")
    manifest = folder.create("sampling: {}\n", BEGUN)
    assert folder.read_manifest() == manifest.manifest
    assert folder.run_yaml.read_text() == "sampling: {}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_folder_that_cannot_be_made_whole_is_not_there(tmp_path):
    with pytest.raises(AttributeError):
        RunFolder(tmp_path, "one").create(None, BEGUN)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    RunFolder(tmp_path, "one").create("", BEGUN).close()
    with pytest.raises(RunExists, match="'one' is taken"):
        RunFolder(tmp_path, "one").create("", BEGUN)


def test_one_process_at_a_time_works_on_a_run_and_what_is_half_written_goes(tmp_path):
    folder = RunFolder(tmp_path, "one")
    manifest = folder.create("", BEGUN)
    draft = folder.media(0, 0).with_name(".00000-t0.mp4.part")
    draft.write_bytes(b"half")
    with pytest.raises(RunLocked, match="another process is at work"):
        folder.open()
    assert draft.exists(), "it may be the other's"
    manifest.close()
    folder.open().close()
    assert not draft.exists()


def test_folders_are_the_owners_alone(tmp_path):
    folder = RunFolder(tmp_path, "one")
    folder.create("", BEGUN).close()
    assert {oct(os.stat(path).st_mode & 0o777) for path in (folder.path, folder.path / "latents")} == {"0o700"}
    assert oct(os.stat(folder.manifest).st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("run_id", ["", "../one", "One", "a/b", "-a", "a" * 65, "a.b", "ü"])
def test_ids_that_could_leave_the_root_are_refused(tmp_path, run_id):
    with pytest.raises(ValueError, match="run id"):
        RunFolder(tmp_path, run_id)


def test_an_unknown_run_is_named(tmp_path):
    for look in (RunFolder(tmp_path, "one").read_manifest, RunFolder(tmp_path, "one").open):
        with pytest.raises(UnknownRun, match="no run 'one'"):
            look()


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_draft_is_published_by_its_name_alone(tmp_path):
    draft, path = tmp_path / ".file.part", tmp_path / "file"
    draft.write_bytes(b"new")
    publish(draft, path)
    assert path.read_bytes() == b"new"
    assert not draft.exists()
