"""The arena: one file, the same bytes for every process, nothing left of it when its owner is gone."""

import errno
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edit_ray.errors import HostMemoryShort
from edit_ray.tiers import arena as arena_module
from edit_ray.tiers.arena import Arena, SharedMemoryFull, make_arena, owner_lives, remove_stale

PAGE = 4096
FORK = multiprocessing.get_context("fork")


def own(connection, folder):
    """A process that owns an arena, in a folder or in none, and says the sum of a tensor in it when asked."""
    arena = Arena.create_unnamed(8 * PAGE) if folder is None else Arena.create(8 * PAGE, folder)
    tensor = arena.tensor(PAGE, torch.float32, (2, 1000))
    tensor.copy_(torch.arange(2000.0).view(2, 1000))
    connection.send(arena.path)
    while True:
        connection.recv()
        connection.send(tensor.sum().item())


@pytest.fixture(params=["in a folder", "in no folder"])
def owner(request, tmp_path):
    """Another process that owns an arena, a connection to it, and that arena's path."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=own, args=(theirs, tmp_path if request.param == "in a folder" else None))
    process.start()
    theirs.close()
    yield process, ours, ours.recv()
    process.kill()
    process.join()


def test_two_processes_share_the_bytes_and_the_arena_ends_with_its_killed_owner(owner, tmp_path):
    process, connection, path = owner
    in_folder = [path] if path.parent == tmp_path else []
    with Arena.open(path) as opened:
        tensor = opened.tensor(PAGE, torch.float32, (2, 1000))
        assert torch.equal(tensor, torch.arange(2000.0).view(2, 1000))
        tensor.fill_(0.5)
        connection.send("sum")
        assert connection.recv() == 1000.0
        assert owner_lives(path)
        with Arena.create(PAGE, tmp_path) as mine:  # while the owner lives, its arena stays
            assert sorted(tmp_path.iterdir()) == sorted([*in_folder, mine.path])
        process.kill()
        process.join()
        assert not owner_lives(path)
        with Arena.create(PAGE, tmp_path) as mine:
            assert list(tmp_path.iterdir()) == [mine.path]
        assert torch.equal(tensor, torch.full((2, 1000), 0.5)), "a process that maps it may still read"
    with pytest.raises(FileNotFoundError):
        Arena.open(path)


def test_what_is_not_in_the_arena_is_refused(tmp_path):
    with Arena.create(2 * PAGE - 5, tmp_path) as arena:
        assert arena.size_bytes == 2 * PAGE == arena.path.stat().st_size
        for region in ((PAGE, 2 * PAGE), (-PAGE, PAGE), (PAGE, -PAGE), (3 * PAGE, 0)):
            with pytest.raises(ValueError, match="lie outside of the arena, which has 8192 bytes"):
                arena.memory(*region)
        with pytest.raises(ValueError, match="4104 bytes at 4096 lie outside"):
            arena.tensor(PAGE, torch.int64, (513,))
    with pytest.raises(ValueError, match="is no folder"):
        Arena.create(PAGE, tmp_path / "nowhere")


def test_a_view_outlives_the_arena_and_the_file_does_not(tmp_path):
    arena = Arena.create(PAGE, tmp_path)
    Arena.open(arena.path).close()
    assert arena.path.exists(), "a process that only opened it leaves the file"
    tensor = arena.tensor(0, torch.uint8, (PAGE,))
    arena.close()
    arena.close()
    assert not list(tmp_path.iterdir())
    assert tensor.fill_(7).sum() == 7 * PAGE
    with pytest.raises(ValueError, match="is closed"):
        arena.memory(0, PAGE)


def test_a_tmpfs_without_a_limit_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=0, f_frsize=PAGE, f_blocks=0))
    with Arena.create(200 * PAGE, tmp_path) as arena:
        assert arena.size_bytes == 200 * PAGE


@pytest.mark.parametrize("way", ["auto", "require", "never"])
@pytest.mark.parametrize("room", [True, False])
def test_an_arena_is_where_it_was_asked_for(monkeypatch, way, room):
    if not room:
        monkeypatch.setattr(arena_module, "_free_bytes", lambda folder: PAGE)
    if way == "require" and not room:
        with pytest.raises(HostMemoryShort, match="/dev/shm has 4096"):
            make_arena(2 * PAGE, way)
        return
    with make_arena(2 * PAGE, way) as arena:
        in_folder = way == "require" or (way == "auto" and room)
        assert arena.path.is_relative_to("/dev/shm") == in_folder
        assert owner_lives(arena.path)
        with Arena.open(arena.path) as other:
            other.memory(0, 3)[:] = b"abc"
            assert bytes(arena.memory(0, 3)) == b"abc"
    assert not owner_lives(arena.path)


def test_where_there_is_too_little_memory_both_places_are_said(monkeypatch):
    monkeypatch.setattr(arena_module, "_free_bytes", lambda folder: PAGE)
    monkeypatch.setattr(arena_module, "_available_bytes", lambda: 2 * PAGE)
    with pytest.raises(HostMemoryShort, match=r"has 4096 .* this node has 8192 .*: lower store.host_bytes"):
        make_arena(3 * PAGE, "auto")
    with pytest.raises(HostMemoryShort, match="this node has 8192"):
        make_arena(3 * PAGE, "never")


def test_shared_memory_that_goes_while_it_is_asked_for_leaves_nothing(tmp_path, monkeypatch):
    def refuse(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SharedMemoryFull, match="needs 4096 bytes"):
        Arena.create(PAGE, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("advice", [arena_module._POPULATE_WRITE, 9999], ids=["populated", "no such advice"])
def test_every_page_is_there_from_the_start(tmp_path, monkeypatch, advice):
    monkeypatch.setattr(arena_module, "_POPULATE_WRITE", advice)
    before = mapped_kib()
    with Arena.create(16 << 20, tmp_path):
        assert mapped_kib() - before >= 16 << 10


def mapped_kib():
    """KiB of file and shared-memory pages that this process has touched."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssFile", "RssShmem"))


def test_other_files_and_living_arenas_are_not_stale(tmp_path):
    (tmp_path / "edit_ray-1-00.arena").write_bytes(b"of a dead owner")
    others = [tmp_path / "other.arena", tmp_path / "edit_ray-1.txt", tmp_path / "edit_ray-folder.arena"]
    others[0].touch()
    others[1].touch()
    others[2].mkdir()
    target = tmp_path / "target"
    target.touch()
    (tmp_path / "edit_ray-link.arena").symlink_to(target)
    with Arena.create(PAGE, tmp_path) as arena:
        remove_stale(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([*others, target, tmp_path / "edit_ray-link.arena", arena.path])
