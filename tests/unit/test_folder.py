import dataclasses
import json
import os

import pytest

from edit_ray.errors import RunExists, UnknownRun
from edit_ray.runs.folder import Manifest, RunFolder, SegmentRecord, write_atomic

RECORD = SegmentRecord(
    0, "a prompt", 7, 0, 33, "latents/00000.safetensors", "segments/00000-t0.m4s", {"denoise_s": 1.5}
)
MANIFEST = Manifest("one", "0.1.0", "running", 128, 128, 16, 2, 57, (RECORD,))


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path, "one")
    folder.create("sampling: {}\n")
    folder.write_manifest(MANIFEST)
    assert folder.read_manifest() == MANIFEST
    assert (folder.path / "run.yaml").read_text() == "sampling: {}\n"


def test_nothing_is_overwritten(tmp_path):
    RunFolder(tmp_path, "one").create("")
    with pytest.raises(RunExists, match="'one' is taken"):
        RunFolder(tmp_path, "one").create("")


def test_folders_are_the_owners_alone(tmp_path):
    folder = RunFolder(tmp_path, "one")
    folder.create("")
    assert {oct(os.stat(path).st_mode & 0o777) for path in (folder.path, folder.path / "latents")} == {"0o700"}


@pytest.mark.parametrize("run_id", ["", "../one", "One", "a/b", "-a", "a" * 65, "a.b", "ü"])
def test_ids_that_could_leave_the_root_are_refused(tmp_path, run_id):
    with pytest.raises(ValueError, match="run id"):
        RunFolder(tmp_path, run_id)


def test_an_unknown_run_is_named(tmp_path):
    with pytest.raises(UnknownRun, match="no run 'one'"):
        RunFolder(tmp_path, "one").read_manifest()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "{", json.dumps(dataclasses.asdict(MANIFEST) | {"schema": 99}), '{"schema": 1}']
)
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(ValueError, match="manifest"):
        Manifest.from_json(text)


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "no bytes")
    assert path.read_bytes() == b"old"
