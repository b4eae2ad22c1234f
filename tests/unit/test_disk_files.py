"""Entries as files: stock safetensors reads them, direct I/O writes them, and every fault of the disk is a class."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from xxhash import xxh3_64_hexdigest

from edit_ray import files
from edit_ray.cache import DiskOffloadStore
from edit_ray.tiers.disk_tier import LOCK, EntryFolder
from edit_ray.tiers.entry_file import LONGEST_HEADER, DirectFiles, DiskFull, aligned_buffer, is_tmpfs, memory_of
from tests.unit.entry_folder import Calls, NoListing, files_in, lost

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
FAULTS = ("missing", "length", "header", "checksum", "read", "write", "full", "remove")
KEY = ("run", 1, None)


class Faulty(Calls):
    """Calls that record the flags of `open` and fail as told: `fail[call]` lists errnos, None for success."""

    def __init__(self, **fail):
        self.fail, self.flags = fail, []

    def before(self, call):
        if self.fail.get(call) and (number := self.fail[call].pop(0)):
            raise OSError(number, os.strerror(number))

    def open(self, path, flags):
        if path.name == LOCK:
            return files.Disk.open(self, path, flags)
        self.flags.append(flags)
        return super().open(path, flags)

    def direct(self):
        return [bool(flags & os.O_DIRECT) for flags in self.flags]


class NoDirect(Faulty):
    """A filesystem that refuses O_DIRECT at one of the calls."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def before(self, call):
        if call == self.at and self.direct()[-1]:
            raise OSError(errno.EINVAL, "no O_DIRECT")


def make(path, calls=None):
    files.disk = calls or files.Disk()
    return DiskOffloadStore(path, allow_tmpfs=True)


def faults(store):
    return {name: count for name, count in store.files.faults.items() if count}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stock_safetensors_reads_our_files(tmp_path, dtype):
    store = make(tmp_path)
    assert tuple(store.files.faults) == FAULTS
    for number, shape in enumerate([(3, 5), (), (0,), (2, 0, 3), (2048,), (2049,), (1, 4096, 24)]):
        tensor = (torch.randn(shape) * 10).to(dtype)
        store.put((number,), tensor)
        (path,) = files_in(tmp_path)
        found = load_file(path)["tensor"]
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert torch.equal(found, tensor)
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        assert (start % 4096, len(content)) == (0, start + tensor.nbytes)
        with safe_open(path, "pt") as file:
            assert file.metadata()["key"] == json.dumps([number])
            assert file.metadata()["xxh3_64"] == xxh3_64_hexdigest(content[start:])
        assert torch.equal(store.get((number,)), tensor)
        store.drop((number,))
    assert (files_in(tmp_path), faults(store)) == ([], {})


def test_a_key_makes_the_header_longer_up_to_a_bound(tmp_path):
    store, tensor = make(tmp_path), torch.arange(5)
    for length in (3000, 5000, 60_000):
        store.put(("k" * length,), tensor)
        store.close()
        store = make(tmp_path)
        assert torch.equal(store.get(("k" * length,)), tensor)
    with pytest.raises(ValueError, match=f"{LONGEST_HEADER} are allowed"):
        store.put(("k" * LONGEST_HEADER,), tensor)
    assert (len(store), len(files_in(tmp_path)), faults(store)) == (3, 3, {})


def test_a_type_that_files_do_not_hold_is_refused(tmp_path):
    store = make(tmp_path)
    with pytest.raises(ValueError, match=r"A file holds no torch.complex64; it can hold torch.float64, torch.float32"):
        store.put(KEY, torch.zeros(3, dtype=torch.complex64))
    assert (len(store), files_in(tmp_path)) == (0, [])


@pytest.mark.parametrize("at", ["create", "write", "read"])
def test_where_direct_io_is_refused_files_are_moved_buffered_from_then_on(tmp_path, at):
    calls, tensor = NoDirect(at), torch.randn(3000)
    store = make(tmp_path, calls)
    store.put(KEY, tensor)
    assert torch.equal(store.get(KEY), tensor)
    assert calls.direct() == ([True, True, False] if at == "read" else [True, False, False])
    store.put(("other",), tensor)
    assert torch.equal(store.get(("other",)), tensor)
    assert calls.direct()[3:] == [False, False]
    assert not store.files.files.direct
    assert torch.equal(load_file(sorted(files_in(tmp_path))[0])["tensor"], tensor)
    assert faults(store) == {}


def test_an_invalid_argument_that_is_not_about_direct_io_is_an_error_and_changes_nothing(tmp_path):
    calls = Faulty(write=[errno.EINVAL, errno.EINVAL])
    store = make(tmp_path, calls)
    with pytest.raises(OSError, match="Invalid argument"):
        store.put(KEY, torch.ones(3))
    store.put(KEY, torch.ones(3))
    assert calls.direct() == [True, False, True]
    assert faults(store) == {"write": 1}


class Bits(files.Disk):
    """A filesystem that moves a few bytes at each call, and is full beyond a size."""

    full_at = 1 << 60

    def write(self, descriptor, parts, offset):
        if offset >= self.full_at:
            raise OSError(errno.ENOSPC, "full")
        return super().write(descriptor, [parts[0][:1000]], offset)

    def read(self, descriptor, parts, offset):
        return super().read(descriptor, [parts[0][:1000]], offset)


def test_calls_that_move_less_than_asked_are_repeated_and_a_file_that_fills_the_disk_leaves_nothing(tmp_path):
    store, tensor = make(tmp_path, Bits()), torch.randn(3000)
    store.put(KEY, tensor)
    assert torch.equal(store.get(KEY), tensor)
    store.close()
    assert torch.equal(make(tmp_path).get(KEY), tensor)
    files.disk = Bits()
    files.disk.full_at = 8192
    store = make(tmp_path / "other", files.disk)
    with pytest.raises(DiskFull, match="full"):
        store.put(KEY, tensor)
    assert (files_in(tmp_path / "other"), len(store), faults(store)) == ([], 0, {"full": 1})


@pytest.mark.parametrize(
    ("call", "number"), [("create", errno.ENOSPC), ("write", errno.EDQUOT), ("rename", errno.ENOSPC)]
)
def test_a_full_disk_is_said_by_type_and_leaves_nothing(tmp_path, call, number):
    store = make(tmp_path, Faulty(**{call: [None, number]}))
    store.put(("other",), torch.ones(5))
    with pytest.raises(DiskFull) as caught:
        store.put(KEY, torch.ones(5000))
    assert caught.value.errno == number
    assert (len(store), store.bytes_resident, len(files_in(tmp_path))) == (1, 20, 1)
    assert (store.get(KEY), faults(store)) == (None, {"full": 1})
    store.put(KEY, torch.ones(5000))  # after the caller has made room
    assert torch.equal(store.get(KEY), torch.ones(5000))


FULL_DISK = """
import os, sys, torch
from edit_ray.cache import DiskOffloadStore
from edit_ray.tiers.entry_file import DiskFull
store = DiskOffloadStore(sys.argv[1], allow_tmpfs=True)
full = 0
for number in range(8):
    try:
        store.put((number,), torch.full((1 << 18,), number, dtype=torch.uint8))
    except DiskFull:
        full += 1
        if len(os.listdir(sys.argv[1])) != len(store) + 1:
            sys.exit("something was left")
        store.drop((number - 3,))
        store.put((number,), torch.full((1 << 18,), number, dtype=torch.uint8))
assert all((store.get(key) == key[0]).all() for key in store.sizes())
print("full", full, "held", len(store), store.files.faults)
"""


def test_a_real_disk_that_fills_up(tmp_path):
    mounted = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted, str(tmp_path)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("this user may not mount a filesystem of its own")
    command += [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("full 5 held 3")
    assert "'full': 5" in done.stdout
    assert "'write': 0" in done.stdout


def test_a_real_limit_of_the_file_s_size_leaves_nothing(tmp_path):
    store, tensor = make(tmp_path), torch.randn(100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            store.put(KEY, tensor)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(caught.value, DiskFull)
    assert (files_in(tmp_path), len(store), faults(store)) == ([], 0, {"write": 1})
    store.put(KEY, tensor)
    assert torch.equal(store.get(KEY), tensor)


@pytest.mark.parametrize(("call", "number"), [("open", errno.EMFILE), ("open", errno.EACCES), ("read", errno.EIO)])
def test_a_read_error_that_may_pass_is_a_miss_and_the_file_stays(tmp_path, call, number):
    make(tmp_path).put(KEY, torch.ones(5))
    store = make(tmp_path)
    files.disk = Faulty(**{call: [number, number]})
    assert (store.get(KEY), store.get(KEY)) == (None, None)
    assert (len(store), store.bytes_resident, lost(store), faults(store)) == (1, 20, 0, {"read": 2})
    assert torch.equal(store.get(KEY), torch.ones(5))


def test_a_file_that_cannot_be_removed_is_counted(tmp_path):
    store = make(tmp_path, Faulty(unlink=[errno.EIO]))
    store.put(KEY, torch.ones(5))
    store.drop(KEY)
    assert (store.get(KEY), len(store), faults(store)) == (None, 0, {"remove": 1})
    store.close()
    assert (len(make(tmp_path)), files_in(tmp_path)) == (0, [])  # the next one to open the folder removes it


def test_drafts_of_a_stopped_writer_are_removed_and_files_of_others_stay(tmp_path):
    name = "0123456789abcdef" * 2
    (tmp_path / f"{name}.unfinished").write_bytes(b"x")
    (tmp_path / f"{name}-17.unfinished").write_bytes(b"x")
    others = [tmp_path / f"{name}-18.safetensors", tmp_path / f"{name}-x.unfinished", tmp_path / "model.safetensors"]
    for other in others:
        save_file({"tensor": torch.zeros(3)}, other, {"key": '["a"]'})
    store = make(tmp_path)
    assert (len(store), faults(store), store.get(("a",))) == (0, {}, None)
    store.put(("a",), torch.ones(3))
    store.clear()
    assert sorted(files_in(tmp_path)) == sorted(others)


def test_a_directory_in_memory_is_no_disk_unless_allowed(tmp_path):
    shared = Path("/dev/shm")
    if not (shared.is_dir() and is_tmpfs(shared)):
        pytest.skip("no tmpfs here")
    folder = shared / f"edit_ray-test-{os.getpid()}"
    try:
        with pytest.raises(ValueError, match=rf"directory is '{folder}', .* \(tmpfs\) .* or allow_tmpfs=True"):
            DiskOffloadStore(folder)
        store = make(folder)
        store.put(KEY, torch.ones(5))
        assert torch.equal(store.get(KEY), torch.ones(5))
        store.clear()
    finally:
        shutil.rmtree(folder)


def test_a_file_of_another_size_is_not_read(tmp_path):
    direct, buffer = DirectFiles(), memory_of(aligned_buffer(8192))
    direct.write(tmp_path / "file", [buffer], 5000)
    assert (tmp_path / "file").stat().st_size == 5000
    assert [direct.read(tmp_path / "file", [buffer], size) for size in (4999, 5000, 5001)] == [False, True, False]
    assert not direct.read(tmp_path / "file", [buffer[:4096]], 4096), "though there is as much"


def test_a_direct_read_of_an_odd_size_stays_in_its_room(tmp_path):
    store, tensor = make(tmp_path), torch.randint(0, 256, (5001,), dtype=torch.uint8)
    store.put(KEY, tensor)
    neighbours = aligned_buffer(4 * 4096).fill_(77)
    assert store.files.read(KEY, memory_of(neighbours)[4096 : 3 * 4096]).nbytes == 5001
    assert torch.equal(neighbours[4096 : 4096 + 5001], tensor)
    assert (neighbours[:4096] == 77).all()
    assert (neighbours[3 * 4096 :] == 77).all()
    with pytest.raises(ValueError, match=r"into has 4096 bytes; .* needs 8192"):
        store.files.read(KEY, memory_of(neighbours)[:4096])


def test_a_folder_that_could_not_be_listed_is_free_at_once(tmp_path):
    with files.swapped(NoListing()), pytest.raises(OSError, match="Input/output") as failed:
        EntryFolder(tmp_path, allow_tmpfs=True)
    assert failed.value.__traceback__ is not None, "somebody may look at the error for long"
    EntryFolder(tmp_path, allow_tmpfs=True).close()
