"""A run's folder is there whole or not at all, and only its owner's."""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from edit_ray import files
from edit_ray.errors import RunExists, RunLocked, UnknownRun
from edit_ray.files import write_atomic
from edit_ray.runs.folder import RunFolder, remove_run
from tests.chaos.power import Power, Recorder
from tests.faults import broken, faulty, first_bytes
from tests.unit.test_manifest import BEGUN, LINES


def test_a_folder_is_made_whole_or_is_not_there(tmp_path):
    folder = RunFolder(tmp_path, "one")
    with pytest.raises(AttributeError):
        folder.create(None, BEGUN)
    assert list(tmp_path.iterdir()) == []
    manifest = folder.create("sampling: {}\n", BEGUN)
    assert folder.read_manifest() == manifest.manifest
    assert folder.run_yaml.read_text() == "sampling: {}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("make", [os.mkdir, lambda path: RunFolder(path.parent, "one").create("", BEGUN).close()])
def test_nothing_is_overwritten(tmp_path, make):
    make(tmp_path / "one")
    with pytest.raises(RunExists, match="'one' is taken"):
        RunFolder(tmp_path, "one").create("", BEGUN)


def test_one_process_at_a_time_works_on_a_run_and_what_is_half_written_goes(tmp_path):
    folder = RunFolder(tmp_path, "one")
    manifest = folder.create("", BEGUN)
    draft = folder.media(0, 0).with_name(".00000-t0.mp4.part")
    draft.write_bytes(b"half")
    with pytest.raises(RunLocked, match="another process is working"):
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


KILLED = """
import os, sys
from pathlib import Path
from edit_ray import files
from edit_ray.runs.folder import RunFolder
from tests.unit.test_manifest import BEGUN

left = int(sys.argv[2])

def kill(name):
    def counted(self, *arguments):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return getattr(files.Disk, name)(self, *arguments)
    return counted

files.disk = type("Killed", (files.Disk,), {name: kill(name) for name in ("open", "mkdir", "write", "replace")})()
RunFolder(Path(sys.argv[1]), "one").create("", BEGUN)
"""


@pytest.mark.one_in(4)
@pytest.mark.parametrize("left", [1, 2, 4, 6])
def test_what_a_killed_submit_has_left_goes_with_the_next_one(tmp_path, left):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(left)], check=False).returncode == 9
    (draft,) = tmp_path.iterdir()
    if not any(draft.iterdir()):
        os.utime(draft, (0, 0))  # before it has a manifest it may be one that is being made
    RunFolder(tmp_path, "two").create("", BEGUN).close()
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_a_folder_with_what_is_not_ours_stays(tmp_path):
    foreign = tmp_path / ".one-0123456789abcdef" / "mine.txt"
    foreign.parent.mkdir()
    foreign.write_text("not to be removed")
    os.utime(foreign.parent, (0, 0))
    RunFolder(tmp_path, "two").create("", BEGUN).close()
    assert foreign.exists()


def test_what_another_process_is_making_stays(tmp_path):
    def replace(call, source, target):
        """While one submission renames its folder another one comes."""
        if target.name == "one":
            RunFolder(tmp_path, "two").create("", BEGUN).close()
        call(source, target)

    with files.swapped(faulty(replace=replace)):
        RunFolder(tmp_path, "one").create("", BEGUN).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_folder_that_could_not_be_made_durable_is_not_there(tmp_path):
    def fsync(call, descriptor):
        (broken if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path) else call)(descriptor)

    with files.swapped(faulty(fsync=fsync)), pytest.raises(OSError, match="Input/output"):
        RunFolder(tmp_path, "one").create("", BEGUN)
    assert list(tmp_path.iterdir()) == []
    RunFolder(tmp_path, "one").create("", BEGUN).close()


WRITER = """
import os, sys, time
from pathlib import Path
from edit_ray import files

print(os.getpid(), flush=True)
with files.replacing(Path(sys.argv[1])) as draft:
    draft.write(sys.argv[2].encode() * 1000)
    sys.stdin.read()  # until it is told to publish, or is killed
"""


def test_processes_with_equal_pids_never_publish_each_others_half(tmp_path):
    path = tmp_path / "file"
    separate = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*separate, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process ids of one's own here")
    writers = [
        subprocess.Popen([*separate, sys.executable, "-c", WRITER, path, who], stdin=PIPE, stdout=PIPE, text=True)
        for who in "ab"
    ]
    assert writers[0].stdout.readline() == writers[1].stdout.readline()
    while sum(draft.stat().st_size for draft in tmp_path.iterdir()) < 2000:
        assert [writer.poll() for writer in writers] == [None, None]
        time.sleep(0.01)
    writers[1].kill()
    assert writers[1].stdout.read() == "", "it is dead, and not only unshare, before the end of its input is seen"
    writers[1].communicate()
    assert not path.exists()
    writers[0].communicate()
    assert path.read_bytes() == b"a" * 1000


def test_a_link_in_the_place_of_a_draft_is_not_followed(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("whole")
    link.symlink_to(victim)
    for path in (link, victim):
        with pytest.raises(FileExistsError):
            files.disk.open(path, files.NEW)
    write_atomic(link, b"new")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("whole", "new", False)


@pytest.mark.parametrize(("name", "make"), [(".probe-{}", Path.touch), (".one-0123456789{}", Path.mkdir)])
def test_old_litter_goes_and_what_is_young_may_be_another_processs(tmp_path, name, make):
    old, young = (tmp_path / name.format(token) for token in ("a1b2c3", "d4e5f6"))
    for path in (old, young):
        make(path)
    os.utime(old, (0, 0))
    RunFolder(tmp_path, "two").create("", BEGUN).close()
    assert (old.exists(), young.exists()) == (False, True)


def test_what_is_made_and_removed_is_durable(tmp_path):
    """Nothing is there but what was synced."""

    def there():
        power = Power()
        for operation in recorder.operations:
            power.follow(operation)
        return {path for path in power.lost(random.Random(), share=0.0)[1] if Path(path).name in ("one", "run.yaml")}

    recorder = Recorder(tmp_path)
    with files.swapped(recorder):
        folder = RunFolder(tmp_path / "some" / "root", "one")
        folder.create("", BEGUN).close()
        assert there() == {"some/root/one", "some/root/one/run.yaml"}
        remove_run(folder)
        assert {path for path in there() if path.endswith("one")} == set()


def test_files_that_a_new_run_shares_are_durable_with_it(tmp_path):
    recorder, power, shared = Recorder(tmp_path), Power(), tmp_path / "shared"
    with files.swapped(recorder):
        files.write_atomic(shared, b"some bytes")
        names = [f"{kind}/00000-t0.end" for kind in ("latents", "segments", "records")] + ["init.mp4"]
        RunFolder(tmp_path, "one").create("", BEGUN, shared=dict.fromkeys(names, shared)).close()
    for operation in recorder.operations:
        power.follow(operation)
    found = power.lost(random.Random(), share=0.0)[1]
    assert [found.get(f"one/{name}") for name in names] == [b"some bytes"] * 4
    assert (tmp_path / "one" / "init.mp4").samefile(shared)


def test_a_new_run_whose_shared_file_is_gone_is_not_there(tmp_path):
    (tmp_path / "shared").write_bytes(b"some bytes")
    shared = {"latents/00000-t0.end": tmp_path / "shared", "segments/00000-t0.end": tmp_path / "gone"}
    with pytest.raises(FileNotFoundError):
        RunFolder(tmp_path, "one").create("", BEGUN, shared=shared)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_reads_of_some_bytes_at_a_time_are_continued(tmp_path):
    folder = RunFolder(tmp_path, "one")
    folder.create("some: text\n", BEGUN).close()
    with files.swapped(faulty(read=first_bytes)):
        folder.open().close()
        assert files.read_bytes(folder.run_yaml) == b"some: text\n"


def test_a_line_that_a_killed_process_did_not_sync_is_durable_once_it_was_read(tmp_path):
    """Whoever reads it acts on it: a loss of power must not take it back."""
    recorder, power = Recorder(tmp_path), Power()
    with files.swapped(recorder):
        folders = [RunFolder(tmp_path / name, "one") for name in ("whole", "killed")]
        whole, killed = (folder.create("", BEGUN) for folder in folders)
        begun = folders[1].manifest.stat().st_size
        whole.append(LINES[0])
        killed.close()
        with files.opened(folders[1].manifest, os.O_RDWR) as descriptor:  # what is written, and dies before it syncs
            files.write_all(descriptor, folders[0].manifest.read_bytes()[begun:], begun)
        with contextlib.closing(folders[1].open()) as opened:
            assert opened.manifest == whole.manifest
    for operation in recorder.operations:
        power.follow(operation)
    _, there = power.lost(random.Random(), share=0.0)
    assert there["killed/one/manifest.jsonl"] == folders[1].manifest.read_bytes()
