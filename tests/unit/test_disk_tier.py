"""The disk tier's threads: straight between an arena and files, in any order of completion, whatever fails."""

import threading
import time
from concurrent.futures import CancelledError, wait

import pytest
import torch

from edit_ray import files
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.entry_file import aligned_buffer, file_name, memory_of
from tests.unit.entry_folder import Calls, files_in

PAGE = 4096


class Gate(Calls):
    """Holds every call of a kind until the gate is opened, and counts those that have arrived."""

    def __init__(self, call):
        self.call, self.opened, self.arrived = call, threading.Event(), threading.Semaphore(0)

    def before(self, call):
        if call == self.call:
            self.arrived.release()
            assert self.opened.wait(20)


def filled(value, size=PAGE):
    return memory_of(aligned_buffer(size).fill_(value))


def write(tier, key, value, size=PAGE):
    return tier.write(key, filled(value, size), torch.uint8, (size,))


def read(tier, key, size=PAGE):
    """The value that fills an entry, None for a miss."""
    into = aligned_buffer(size)
    entry = tier.read(key, memory_of(into)).result(20)
    if entry is None:
        return None
    assert (entry.dtype, entry.shape) == (torch.uint8, (size,))
    (value,) = set(into[:size].tolist())
    return value


@pytest.fixture
def open_tier(tmp_path):
    tiers = []

    def open_tier(calls=None, num_threads=2):
        files.disk = calls or files.Disk()
        tiers.append(DiskTier(tmp_path, num_threads=num_threads, allow_tmpfs=True))
        return tiers[-1]

    yield open_tier
    for tier in tiers:
        tier.close()


def test_many_entries_at_once_over_all_threads(open_tier, tmp_path):
    tier = open_tier(num_threads=4)
    done = wait([write(tier, (number,), number, 3 * PAGE) for number in range(64)]).done
    assert all(future.result() for future in done)
    into = [aligned_buffer(3 * PAGE) for _ in range(64)]
    reads = [tier.read((number,), memory_of(buffer)) for number, buffer in enumerate(into)]
    assert all(future.result() for future in reads)
    assert all((buffer == number).all() for number, buffer in enumerate(into))
    assert len(list(tmp_path.glob("*.safetensors"))) == 64
    for number in range(64):
        tier.drop((number,))
    tier.close()
    assert (files_in(tmp_path), set(tier.files.faults.values())) == ([], {0})


@pytest.mark.parametrize("last", ["dropped", "written anew"])
def test_a_write_that_is_overtaken_publishes_nothing(open_tier, tmp_path, last):
    gate = Gate("write")
    tier = open_tier(gate)
    gate.opened.set()
    assert write(tier, ("a",), 9).result()
    gate.opened.clear()
    gate.arrived.acquire()
    first = write(tier, ("a",), 1)
    gate.arrived.acquire()
    assert (read(tier, ("a",)), tier.files.entries(), tier.files.bytes_resident) == (None, {}, 0), "replaced at once"
    second = write(tier, ("a",), 2) if last == "written anew" else None
    if last == "dropped":
        tier.drop(("a",))
    gate.opened.set()
    assert not first.result()
    if second:
        assert second.result()
    assert read(tier, ("a",)) == (2 if second else None)
    tier.close()
    assert len(files_in(tmp_path)) == (1 if second else 0)
    assert set(tier.files.faults.values()) == {0}


@pytest.mark.parametrize("at", ["open", "read"])
@pytest.mark.parametrize("last", ["dropped", "replaced"])
def test_a_read_that_is_overtaken_is_right_or_a_miss_and_no_fault(open_tier, at, last):
    gate = Gate(at)
    tier = open_tier(gate)
    assert write(tier, ("a",), 1).result()
    into = aligned_buffer(PAGE)
    future = tier.read(("a",), memory_of(into))
    assert gate.arrived.acquire(timeout=20)
    if last == "dropped":
        tier.drop(("a",))
    else:
        assert write(tier, ("a",), 2).result()
    gate.opened.set()
    found = future.result()
    if at == "read":
        assert (into == 1).all()  # the file was open, and held what was there when the read was asked for
    elif last == "dropped":
        assert found is None
    else:
        assert (into == 2).all()
    assert read(tier, ("a",)) == (None if last == "dropped" else 2)
    assert set(tier.files.faults.values()) == {0}


def test_closing_with_a_full_queue_cancels_what_waits_and_leaves_no_drafts(open_tier, tmp_path):
    gate = Gate("write")
    tier = open_tier(gate, num_threads=1)
    gate.opened.set()
    assert write(tier, ("kept",), 9).result()
    assert write(tier, ("replaced",), 9).result()
    gate.opened.clear()
    gate.arrived.acquire()
    gate.arrived.acquire()
    moving = write(tier, ("a",), 1)
    gate.arrived.acquire()
    begun = write(tier, ("b",), 2)
    while not begun.running():  # by the second thread, which waits for its turn at the disk, and takes nothing else
        time.sleep(0.001)
    waiting = [write(tier, (name,), 2) for name in ("c", "replaced")]
    waiting.append(tier.read(("kept",), filled(0)))
    tier.drop(("kept",))
    closing = threading.Thread(target=tier.close)
    closing.start()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(20)
    gate.opened.set()
    closing.join(20)
    assert moving.result()
    assert begun.result()
    assert {path.name for path in files_in(tmp_path)} == {file_name((name,)) for name in ("a", "b")}
    for call in (lambda: write(tier, ("a",), 1), lambda: tier.read(("a",), filled(0)), lambda: tier.drop(("a",))):
        with pytest.raises(RuntimeError, match=r"is closed|after shutdown"):
            call()
    assert read(open_tier(), ("a",)) == 1


def test_memory_that_is_too_short_is_refused(open_tier, tmp_path):
    tier = open_tier()
    with pytest.raises(ValueError, match=r"memory has 4096 bytes; \('a',\) needs 8192"):
        tier.write(("a",), filled(0), torch.float32, (1025,)).result()
    with pytest.raises(TypeError):
        tier.write((1.5,), filled(0), torch.uint8, (1,))
    assert files_in(tmp_path) == []
