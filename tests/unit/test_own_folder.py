"""A disk tier's folder: one store at a time, whatever the processes, and nobody else's business."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edit_ray.config import load_config
from edit_ray.errors import ConfigError
from edit_ray.tiers.entry_file import file_name
from edit_ray.tiers.options import StoreOptions
from tests.store_here import StoreHere
from tests.unit.entry_folder import files_in, on_disk
from tests.unit.test_leases import RUN, leases_on, make_segment

ROOT = Path(__file__).resolve().parents[2]
KEY = ("run", 1, None)


def test_a_folder_and_its_files_are_for_their_user_alone(tmp_path):
    before = os.umask(0o022)
    try:
        on_disk(tmp_path / "disk" / "tier").put(KEY, torch.ones(3))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "disk").rglob("*")}
    assert modes == {"tier": 0o700, ".lock": 0o600, file_name(KEY): 0o600}
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o700


def test_a_second_store_on_a_folder_is_refused_until_the_first_is_closed_or_gone(tmp_path):
    first = on_disk(tmp_path)
    first.put(KEY, torch.ones(3))
    (tmp_path / f"{'0' * 32}-1.unfinished").touch()  # a draft of the first one's
    with pytest.raises(ValueError, match=rf"^directory is '{tmp_path}', which another store has open; it must be a "):
        on_disk(tmp_path)
    assert len(files_in(tmp_path)) == 2
    assert torch.equal(first.get(KEY), torch.ones(3))
    first.close()
    first.close()
    for call in (lambda: first.put(KEY, torch.zeros(3)), lambda: first.get(KEY), first.clear):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    second = on_disk(tmp_path)
    assert torch.equal(second.get(KEY), torch.ones(3))
    del second
    assert len(on_disk(tmp_path)) == 1


def test_a_forked_child_does_not_unlock_the_folder(tmp_path):
    store = on_disk(tmp_path)
    child = os.fork()
    if child == 0:
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ValueError, match="another store"):
        on_disk(tmp_path)
    store.put(KEY, torch.ones(3))


@pytest.mark.parametrize(
    "namespaces",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["one pid namespace", "a pid namespace each"],
)
def test_of_processes_that_open_a_folder_by_chance_one_at_a_time_has_it(tmp_path, namespaces):
    if namespaces and subprocess.run(["unshare", "-Upf", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no pid namespace")
    command = [sys.executable, "-m", "tests.unit.store_holders", str(tmp_path), str(int(namespaces))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_takes_an_entry_s_place_is_not_read(tmp_path, kind):
    store = on_disk(tmp_path / "disk")
    store.put(KEY, torch.ones(3))
    path, moved = tmp_path / "disk" / file_name(KEY), tmp_path / "moved"
    path.rename(moved)
    {"link": lambda: path.symlink_to(moved), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    assert store.get(KEY) is None
    store.close()
    assert len(on_disk(tmp_path / "disk")) == 0


@pytest.mark.parametrize(("worker", "own"), [(0, "other-1"), (1, "worker-1")], ids=["two clusters", "two GPU actors"])
def test_stores_on_one_directory_keep_out_of_each_other_s_way(tmp_path, worker, own):
    """Both are at work on runs of one name; the second has a folder of its own, and each finds its own again."""
    directory, stores = tmp_path / ".cache_store", [StoreHere(), StoreHere(worker)]
    first, second = (leases_on(store, tmp_path, "require") for store in stores)
    make_segment(first, 0)
    draft = directory / ("0" * 32 + "-1.unfinished")
    draft.touch()
    make_segment(second, 0)
    assert draft.exists()
    assert len(list(directory.glob("*.safetensors"))) == len(list((directory / own).glob("*.safetensors"))) == 8
    assert make_segment(first, 1)[0] == make_segment(second, 1)[0] == 8
    for leases, store in zip((first, second), stores, strict=True):
        leases.close()
        store.call("drop_run", RUN, directory)()
        store.close()
    assert list(directory.rglob("*.safetensors")) == []


@pytest.mark.parametrize("variable", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NVME_KEY", "EDIT_RAY_TOKEN"])
@pytest.mark.parametrize("form", ["/x/${name}/y", "/x/${{{name}}}"])
def test_a_directory_may_not_name_a_variable_that_may_hold_a_secret(tmp_path, variable, form, monkeypatch):
    monkeypatch.setenv(variable, "hf_abcdef")
    directory = form.replace("{name}", variable).replace("{{", "{").replace("}}", "}")
    config = ROOT / "configs" / "tiny.yaml"
    with pytest.raises(ConfigError, match=r"store\.directory is '/x/\$.*it must be text .* \$NVME, .* \$EDIT_RAY_DISK"):
        load_config(config, [f"store.directory={directory}"], check_model=False)
    with pytest.raises(ConfigError, match=r"names the variable .* not allowed") as caught:
        StoreHere().call("follow", "x", {}, {}, 0, StoreOptions(host_bytes=8192), Path(directory), tmp_path)()
    assert "hf_abcdef" not in str(caught.value)
    assert load_config(config, ["store.directory=$NVME/a"], check_model=False).store.directory == "$NVME/a"


@pytest.mark.parametrize("problem", ["a file", "no such variable", "not writable"])
def test_what_a_variable_holds_is_in_no_error(tmp_path, problem, monkeypatch):
    """The error is the client's to read, and goes into the manifest."""
    (tmp_path / "SECRET").write_text("")
    monkeypatch.setenv(
        "EDIT_RAY_DISK", {"a file": str(tmp_path / "SECRET"), "not writable": "/proc/SECRET"}.get(problem, "")
    )
    options = StoreOptions(host_bytes=8192, allow_tmpfs=True)
    with pytest.raises(ConfigError, match=r"^store\.directory is '\$EDIT_RAY_DISK', which .*\.$") as caught:
        StoreHere().call("follow", "x", {}, {}, 0, options, Path("$EDIT_RAY_DISK"), tmp_path)()
    assert "SECRET" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_told_by_the_directory_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv("EDIT_RAY_DISK", str(tmp_path / "SECRET"))
    store = StoreHere()
    leases = leases_on(store, tmp_path, "require", directory="$EDIT_RAY_DISK")
    leases.begin(0, 0, history_len=1)
    shutil.rmtree(tmp_path / "SECRET")
    with pytest.raises(OSError, match=r"\$EDIT_RAY_DISK") as caught:
        make_segment(leases, 0)
    assert "SECRET" not in str(caught.value)
    leases.close()
    store.close()
