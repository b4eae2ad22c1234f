"""The arena over the disk as a segment uses it: what was written is read, in however little memory."""

import errno
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from edit_ray import files
from edit_ray.errors import EntryLost, StaleLease
from edit_ray.tiers.arena import Arena, EntryForm, Op, began_before, is_gone, this_process
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.reuse_plan import make_reuse_plan
from edit_ray.tiers.service import TABLES_BYTES, TierService
from edit_ray.tiers.slots import divide
from edit_ray.tiers.store_client import PlannedStore

RUN, EXPERT = "run", "transformer"
SHAPE = (1, 64, 32)
SIZE = 64 * 32 * 4
FORM = EntryForm(torch.device("cpu"), torch.float32, SHAPE)
UNITS, WARM = 2, 3


def plan_of(num_segments=8, window=4):
    return make_reuse_plan(
        RUN, num_segments, window=window, warm_steps=WARM, experts=[EXPERT] * 6, unit_bytes={EXPERT: [SIZE] * UNITS}
    )


def tensor_of(key):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(hash(key) & 0xFFFF))


@pytest.fixture
def tiers_in(tmp_path):
    """Makes the tiers of a host that holds so many entries; the same directory each time."""
    made = []

    def make(entries=3):
        arena = Arena.create(entries * SIZE + TABLES_BYTES, tmp_path)
        made.append(TierService(arena, {SIZE: entries}, DiskTier(tmp_path / "disk", allow_tmpfs=True)))
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


def begin(tiers, plan, segment, attempt=0, holder=1, ahead=0, **options):
    ops = Reuse(plan, FORM).ops(segment)
    lease = tiers.prepare(RUN, segment, attempt, holder, ops)
    options |= {"prefix": (RUN,), "ahead_bytes": ahead * SIZE, "timeout_s": 10}
    return PlannedStore(Arena.open(lease.arena), lease.table, ops, **options)


def complete(tiers, segment, attempt=0, holder=1):
    tiers.complete(RUN, segment, attempt, holder, tiers.incarnation)


def open_prefetches(figures):
    counts = figures["counts"]
    return counts["prefetches_requested",] - sum(number for name, number in counts.items() if name[0] == "prefetches")


def make(store, segment, upto=None):
    """What the segment's loop does: at each step, branch and unit it reads or writes."""
    read = 0
    for op in store.ops[:upto]:
        key = op.key[1:]
        if op.writes:
            store.put(key, tensor_of(op.key))
            assert torch.equal(store.get(key), tensor_of(op.key))
        else:
            assert torch.equal(store.get(key), tensor_of(op.key))
            read += 1
    return read


@pytest.mark.parametrize("entries", [1, 2, 5, 100])
@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_a_run_reads_what_it_wrote_in_however_little_memory(tiers_in, entries, ahead):
    tiers, plan = tiers_in(entries), plan_of()
    tiers.follow(plan.uses())
    stores = {0: begin(tiers, plan, 0, ahead=ahead)}
    read = 0
    for segment in range(8):
        store = stores.pop(segment)
        if segment + 1 < 8:
            # asked for while this one is made
            stores[segment + 1] = begin(tiers, plan, segment + 1, ahead=ahead)
        read += make(store, segment)
        store.finish()
        complete(tiers, segment)
        assert tiers.statistics()["bytes"]["host"] <= entries * SIZE
    assert read == sum(len(s.reads) for s in plan.segments) > 60
    figures = tiers.statistics()
    assert figures["peak_bytes"]["host"] <= entries * SIZE
    assert figures["entries_in"]["disk"] == 12, "what the last segment has read, and nothing else"
    came = figures["counts"]["prefetches", "useful"] + figures["counts"]["prefetches", "late"]
    assert (open_prefetches(figures), came > 0) == (0, entries < 12)
    tiers.drop_run(RUN)
    assert tiers.statistics()["entries_in"]["disk"] == 0


def test_what_a_completed_segment_wrote_outlives_its_store(tiers_in):
    plan = plan_of()
    first = tiers_in()
    first.follow(plan.uses())
    store = begin(first, plan, 0)
    make(store, 0)
    store.finish()
    complete(first, 0)
    half = begin(first, plan, 1)
    make(half, 1, upto=4)
    first.close()  # as if it had died; what it has written by then is there

    second = tiers_in()
    second.follow(plan.uses(), 1)
    with pytest.raises(StaleLease, match="Segment 1 of 'run' was given to another"):
        complete(second, 1)
    again = begin(second, plan, 1, attempt=1)
    assert make(again, 1) == len(plan.segments[1].reads)
    again.finish()
    complete(second, 1, 1)


def test_an_attempt_that_was_given_up_leaves_nothing(tiers_in):
    plan = plan_of()
    tiers = tiers_in(4)
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0, holder="dead")
    make(store, 0, upto=5)
    tiers.give_up(RUN, "dead")
    figures = tiers.statistics()
    assert (figures["entries_in"]["disk"], figures["bytes"]["host"], figures["bytes"]["disk"]) == (0, 0, 0)
    with pytest.raises(StaleLease):
        complete(tiers, 0, 0, "dead")
    again = begin(tiers, plan, 0, attempt=1, holder="new")
    make(again, 0)
    again.finish()
    complete(tiers, 0, 1, "new")
    later = begin(tiers, plan, 1, holder="new")
    make(later, 1)


def test_the_last_reader_may_be_made_again(tiers_in):
    plan = plan_of(num_segments=3, window=2)
    tiers = tiers_in(2)
    tiers.follow(plan.uses())
    for segment in (0, 1):
        store = begin(tiers, plan, segment)
        make(store, segment)
        store.finish()
        complete(tiers, segment)
    for attempt in range(3):
        store = begin(tiers, plan, 2, attempt)
        assert make(store, 2) == len(plan.segments[2].reads)
    store.finish()
    complete(tiers, 2, 2)


@pytest.mark.parametrize("segment", [0, 2, 4, 5])
def test_a_complete_segment_of_which_nobody_heard_may_be_made_again(tiers_in, segment):
    plan, tiers = plan_of(), tiers_in(2)
    tiers.follow(plan.uses())
    for index, attempt in [*((index, 0) for index in range(segment)), (segment, 0), (segment, 1), (segment + 1, 0)]:
        store = begin(tiers, plan, index, attempt)
        assert make(store, index) == len(plan.segments[index].reads)
        store.finish()
        complete(tiers, index, attempt)


def test_a_lost_entry_is_said_and_not_made_up(tiers_in):
    plan = plan_of()
    tiers = tiers_in(1)
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0)
    make(store, 0)
    store.finish()
    complete(tiers, 0)
    for file in tiers.disk.files.directory.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(EntryLost, match="has lost"):
        make(begin(tiers, plan, 1), 1)
    assert tiers.statistics()["faults"]["checksum"] > 0


def test_a_planned_write_that_was_not_computed_is_said(tiers_in):
    plan = plan_of()
    tiers = tiers_in(2)
    store = begin(tiers, plan, 0)
    make(store, 0, upto=3)
    with pytest.raises(EntryLost, match="was not computed"):
        store.finish()


def test_reads_that_are_passed_over_make_room(tiers_in):
    plan = plan_of()
    tiers = tiers_in(2)
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0)
    make(store, 0)
    store.finish()
    complete(tiers, 0)
    store = begin(tiers, plan, 1)
    last = store.ops[-1]
    assert torch.equal(store.get(last.key[1:]), tensor_of(last.key))
    store.finish()
    complete(tiers, 1)


def test_own_residuals_stay_as_long_as_they_are_read(tiers_in):
    tiers = tiers_in(2)
    store = begin(tiers, plan_of(), 0, history_len=2)
    for step in range(10, 14):
        store.put((0, EXPERT, "cond", 0, step), torch.full(SHAPE, float(step)))
    assert store.get((0, EXPERT, "cond", 0, 11)) is None
    assert store.get((0, EXPERT, "cond", 0, 12))[0, 0, 0] == 12
    assert store.waits.writes == 0


def test_random_delays_change_nothing(tiers_in, monkeypatch):
    noise = random.Random(3)
    plan, tiers = plan_of(6, 2), tiers_in(2)
    read, write = tiers.disk.files.read, tiers.disk.files.write

    def slow(call):
        def wrapped(*arguments):
            time.sleep(noise.random() * 0.01)
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(tiers.disk.files, "read", slow(read))
    monkeypatch.setattr(tiers.disk.files, "write", slow(write))
    tiers.follow(plan.uses())
    store, read = begin(tiers, plan, 0), 0
    for segment in range(6):
        following = begin(tiers, plan, segment + 1) if segment < 5 else None
        read += make(store, segment)
        store.finish()
        complete(tiers, segment)
        store = following
    assert read == sum(len(s.reads) for s in plan.segments) > 20


# Holders: processes that write into the arena.


@pytest.fixture
def other_process():
    """A process that lives until it is ended, and its name as a holder."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process, f"{process.pid}-{start_of(process.pid)}"
        process.kill()


def start_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_holder_is_a_process_and_no_later_one_of_its_pid(other_process):
    process, holder = other_process
    assert not is_gone(holder)
    assert is_gone(f"{process.pid}-{int(start_of(process.pid)) - 1}"), "another process had this pid"
    assert not is_gone(this_process())
    assert began_before(this_process(), holder) or start_of("self") == start_of(process.pid)
    process.kill()
    assert wait_until(lambda: is_gone(holder)), "dead, although nobody has asked for it"


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def test_what_a_holder_may_still_write_to_returns_when_its_process_is_gone(tiers_in, other_process):
    process, holder = other_process
    plan, tiers = plan_of(), tiers_in(4)
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0, holder=holder)
    make(store, 0, upto=2)  # two more have a place
    wait_until(lambda: store.table.place(3) >= 0)
    view = store.arena.tensor(store.table.place(3), FORM.dtype, SHAPE)
    again = begin(tiers, plan, 0, attempt=1, holder="successor")
    figures = tiers.statistics()
    assert (figures["orphans"], figures["bytes"]["host"] > 0) == (1, True)
    with pytest.raises(StaleLease):
        complete(tiers, 0, 0, holder)
    view.fill_(7.0)  # the last copy of who does not know yet
    process.kill()
    make(again, 0)  # takes the whole arena, as soon as it can be had
    assert is_gone(holder)
    again.finish()
    complete(tiers, 0, 1, "successor")
    assert wait_until(lambda: tiers.statistics()["orphans"] == 0)
    assert tiers.statistics()["stale_leases"] == 1
    assert make(begin(tiers, plan, 1, holder="successor"), 1) == len(plan.segments[1].reads)


def test_a_holder_that_began_earlier_cannot_take_a_run_back(tiers_in, other_process):
    _, holder = other_process
    earlier = f"{os.getpid()}-{int(start_of(os.getpid())) - 1}"
    plan, tiers = plan_of(), tiers_in(4)
    tiers.follow(plan.uses())
    begin(tiers, plan, 0, holder=holder)
    with pytest.raises(StaleLease, match="which began later"):
        begin(tiers, plan, 0, attempt=1, holder=earlier)
    tiers.drop_run(RUN)
    begin(tiers, plan, 0, holder=earlier)
    assert tiers.statistics()["stale_leases"] == 1


def test_a_lease_of_another_incarnation_is_refused_and_counted(tiers_in):
    plan, tiers = plan_of(), tiers_in(2)
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0)
    make(store, 0)
    store.finish()
    for refused in ((1, 1, tiers.incarnation), (0, 2, tiers.incarnation), (0, 1, "another store")):
        with pytest.raises(StaleLease):
            tiers.complete(RUN, 0, *refused)
    tiers.complete(RUN, 0, 0, 1, tiers.incarnation)
    assert tiers.statistics()["stale_leases"] == 3


def test_a_holder_that_gives_up_gets_nothing_dropped_of_what_it_completed(tiers_in):
    plan, tiers = plan_of(), tiers_in(4)
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0, holder=this_process())
    make(store, 0)
    store.finish()
    complete(tiers, 0, 0, this_process())
    begin(tiers, plan, 1, holder=this_process())
    tiers.give_up(RUN, this_process())
    keys = [op.key for op in store.ops if op.writes]
    assert tiers.missing([*keys, ("no", "such")]) == [("no", "such")]
    assert tiers.statistics()["orphans"] == 0


def test_what_is_complete_is_synced_and_nothing_before(tiers_in):
    plan, tiers, synced = plan_of(), tiers_in(2), []

    class Calls(files.Disk):
        def fsync(self, descriptor):
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            super().fsync(descriptor)

    files.disk = Calls()
    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0)
    make(store, 0)
    store.finish()
    assert synced == []
    complete(tiers, 0)
    assert len(set(synced)) == sum(op.writes for op in store.ops) + 1, "every file, and the folder"


def test_what_cannot_be_synced_is_not_complete(tiers_in):
    plan, tiers = plan_of(), tiers_in(2)

    class Calls(files.Disk):
        def fsync(self, descriptor):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    tiers.follow(plan.uses())
    store = begin(tiers, plan, 0)
    make(store, 0)
    store.finish()
    whole, files.disk = files.disk, Calls()
    with pytest.raises(OSError, match="Input/output"):
        complete(tiers, 0)
    files.disk = whole
    again = begin(tiers, plan, 0, attempt=1)
    make(again, 0)
    again.finish()
    complete(tiers, 0, 1)


def test_a_closed_store_refuses_instead_of_being_silent(tiers_in):
    tiers = tiers_in(2)
    tiers.close()
    with pytest.raises(StaleLease, match="closed"):
        begin(tiers, plan_of(), 0)
    tiers.close()


def test_a_folder_that_was_removed_is_no_fault_at_the_end(tiers_in):
    tiers = tiers_in(2)
    shutil.rmtree(tiers.disk.files.directory)
    assert tiers.arena.path.exists()
    tiers.close()
    assert not tiers.arena.path.exists()


def test_a_folder_that_fails_at_the_end_is_let_go_all_the_same(tiers_in):
    class Broken(files.Disk):
        def listdir(self, _path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    tiers = tiers_in(2)
    with files.swapped(Broken()):
        tiers.close()
    assert not tiers.arena.path.exists()
    DiskTier(tiers.disk.files.directory, allow_tmpfs=True).close()


def test_keys_and_values_of_a_causal_model_are_kept_like_residuals(tmp_path):
    """Entries of two sizes, known before the run: each chunk reads those of the two before it, and writes its own."""
    keys = EntryForm(torch.device("cpu"), torch.bfloat16, (2, 3, 64, 32))
    values = EntryForm(torch.device("cpu"), torch.float32, (1, 16, 16))
    forms, window, chunks = {"k": keys, "v": values}, 2, 8

    def ops_of(chunk):
        reads = [(earlier, name) for earlier in range(max(0, chunk - window), chunk) for name in forms]
        return [
            *(Op((RUN, earlier, EXPERT, name, 0, 0), forms[name], False) for earlier, name in reads),
            *(Op((RUN, chunk, EXPERT, name, 0, 0), form, True) for name, form in forms.items()),
        ]

    uses = {}
    for chunk in range(chunks):
        for op in ops_of(chunk):
            if not op.writes:
                uses.setdefault(op.key, []).append((chunk, len(uses)))
    slots = divide(30_000, {form.size: window + 1 for form in forms.values()})
    assert slots == {4096: 1, 24_576: 1}
    arena = Arena.create(sum(size * number for size, number in slots.items()) + TABLES_BYTES, tmp_path)
    tiers = TierService(arena, slots, DiskTier(tmp_path / "disk", allow_tmpfs=True))
    tiers.follow(uses)
    read = 0
    for chunk in range(chunks):
        ops = ops_of(chunk)
        lease = tiers.prepare(RUN, chunk, 0, 1, ops)
        store = PlannedStore(tiers.arena, lease.table, ops, prefix=(RUN,), timeout_s=10)
        for op in ops:
            value = torch.full(op.form.shape, op.key[1] + (op.key[3] == "v") / 2, dtype=op.form.dtype)
            if op.writes:
                store.put(op.key[1:], value)
            else:
                assert torch.equal(store.get(op.key[1:]), value)
                read += 1
        store.finish()
        complete(tiers, chunk)
    assert read == 2 * (1 + 2 * (chunks - 2))
    assert tiers.statistics()["counts"]["tier_lookups", "disk", "hit"] > 0
    tiers.close()
