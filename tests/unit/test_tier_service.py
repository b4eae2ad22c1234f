"""The arena over the disk as a segment uses it: reads return what was written, in however little memory."""

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from edit_ray import files
from edit_ray.errors import EntryLost, StaleLease
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.protocol import EntryForm, Op, began_before, is_gone, this_process
from edit_ray.tiers.reuse_plan import make_reuse_plan
from edit_ray.tiers.service import TABLES_BYTES, TierService
from edit_ray.tiers.slots import divide
from edit_ray.tiers.store_client import PlannedStore
from tests.unit.entry_folder import NoListing

RUN, EXPERT = "run", "transformer"
SHAPE = (1, 64, 32)
SIZE = 64 * 32 * 4
FORM = EntryForm(torch.device("cpu"), torch.float32, SHAPE)
SEGMENTS = 8
PLAN = make_reuse_plan(RUN, SEGMENTS, window=4, warm_steps=3, experts=[EXPERT] * 6, unit_bytes={EXPERT: [SIZE] * 2})


class Tiers(TierService):
    """The tiers of one run, and what its processes do."""

    def begin(self, segment, attempt=0, holder=1, ahead=0, **options):
        ops = Reuse(PLAN, FORM).ops(segment)
        lease = self.prepare(RUN, segment, attempt, holder, ops)
        options |= {"prefix": (RUN,), "ahead_bytes": ahead * SIZE, "timeout_s": 10}
        return PlannedStore(Arena.open(lease.arena), lease.table, ops, **options)

    def end(self, segment, attempt=0, holder=1):
        self.complete(RUN, segment, attempt, holder, self.incarnation)

    def make(self, segment, attempt=0, holder=1):
        """A whole segment; the number of its reads."""
        store = self.begin(segment, attempt, holder)
        read = use(store)
        store.finish()
        self.end(segment, attempt, holder)
        return read

    def host(self):
        return self.statistics()["bytes"]["host"]

    def entries(self):
        return self.statistics()["entries_in"]["disk"]


def use(store, upto=None):
    """What the segment's loop does: at each step, branch and unit it reads or writes."""
    read = 0
    for op in store.ops[:upto]:
        if op.writes:
            store.put(op.key[1:], tensor_of(op.key))
        else:
            read += 1
        assert torch.equal(store.get(op.key[1:]), tensor_of(op.key))
    return read


def tensor_of(key):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(hash(key) & 0xFFFF))


def reads_of(segment):
    return len(PLAN.segments[segment].reads)


@pytest.fixture
def tiers_in(tmp_path):
    """Makes the tiers of a host with a number of entries, in the same directory each time; they follow the plan."""
    made = []

    def make(entries=3, segment=0):
        arena = Arena.create(entries * SIZE + TABLES_BYTES, tmp_path)
        made.append(Tiers(arena, {SIZE: entries}, DiskTier(tmp_path / "disk", allow_tmpfs=True)))
        made[-1].follow(PLAN.uses(), segment)
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


@pytest.mark.parametrize("entries", [1, 5, 100])
@pytest.mark.parametrize("ahead", [0, 1, 100])
def test_a_run_reads_what_it_wrote_in_however_little_memory(tiers_in, entries, ahead):
    tiers, read = tiers_in(entries), 0
    stores = {0: tiers.begin(0, ahead=ahead)}
    for segment in range(SEGMENTS):
        store = stores.pop(segment)
        if segment + 1 < SEGMENTS:
            stores[segment + 1] = tiers.begin(segment + 1, ahead=ahead)  # asked for while this one is made
        read += use(store)
        store.finish()
        tiers.end(segment)
        assert tiers.host() <= entries * SIZE
    assert read == sum(map(reads_of, range(SEGMENTS))) > 60
    figures, counts = tiers.statistics(), tiers.statistics()["counts"]
    assert figures["peak_bytes"]["host"] <= entries * SIZE
    assert tiers.entries() == 12, "those of the last segment's reads, and no others"
    assert counts["prefetches_requested",] == sum(n for name, n in counts.items() if name[0] == "prefetches")
    assert (counts["prefetches", "useful"] + counts["prefetches", "late"] > 0) == (entries < 12)
    tiers.drop_run(RUN)
    assert tiers.entries() == 0


def test_a_lost_entry_and_an_uncomputed_write_raise(tiers_in):
    tiers = tiers_in(1)
    store = tiers.begin(0)
    use(store, upto=3)
    with pytest.raises(EntryLost, match="was not computed"):
        store.finish()
    tiers.make(0, attempt=1)
    for file in tiers.disk.files.directory.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(EntryLost, match="has lost"):
        use(tiers.begin(1))
    assert tiers.statistics()["faults"]["checksum"] > 0


def test_own_residuals_stay_as_long_as_they_are_read(tiers_in):
    store = tiers_in(2).begin(0, history_len=2)
    for step in range(10, 14):
        store.put((0, EXPERT, "cond", 0, step), torch.full(SHAPE, float(step)))
    assert store.get((0, EXPERT, "cond", 0, 11)) is None
    assert store.get((0, EXPERT, "cond", 0, 12))[0, 0, 0] == 12
    assert store.waits.writes == 0


# Holders: processes that write into the arena.


@pytest.fixture
def other_process():
    """A process that lives until it is ended, and its name as a holder."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process, f"{process.pid}-{start_of(process.pid)}"
        process.kill()


def start_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


def test_a_holder_is_a_process_and_no_later_one_of_its_pid(other_process):
    process, holder = other_process
    assert not is_gone(holder)
    assert is_gone(f"{process.pid}-{int(start_of(process.pid)) - 1}"), "another process had this pid"
    assert not is_gone(this_process())
    assert began_before(this_process(), holder) or start_of("self") == start_of(process.pid)
    process.kill()
    assert wait_until(lambda: is_gone(holder)), "dead, although its parent has not waited for it"


def test_slots_that_a_replaced_holder_may_still_write_to_are_freed_when_its_process_is_gone(tiers_in, other_process):
    process, holder = other_process
    tiers = tiers_in(4)
    store = tiers.begin(0, holder=holder)
    use(store, upto=2)  # two more have a place
    wait_until(lambda: store.table.place(3) >= 0)
    view = store.arena.tensor(store.table.place(3), FORM.dtype, SHAPE)
    again = tiers.begin(0, attempt=1, holder="successor")
    assert (tiers.statistics()["orphans"], tiers.host() > 0) == (1, True)
    with pytest.raises(StaleLease):
        tiers.end(0, holder=holder)
    view.fill_(7.0)  # the last copy of a process that has not heard of it
    process.kill()
    use(again)  # takes the whole arena, as soon as it is free
    assert is_gone(holder)
    again.finish()
    tiers.end(0, 1, "successor")
    assert wait_until(lambda: tiers.statistics()["orphans"] == 0)
    assert tiers.statistics()["stale_leases"] == 1
    assert tiers.make(1, holder="successor") == reads_of(1)


def test_a_holder_that_began_earlier_cannot_take_a_run_back(tiers_in, other_process):
    _, holder = other_process
    earlier = f"{os.getpid()}-{int(start_of(os.getpid())) - 1}"
    tiers = tiers_in(4)
    tiers.begin(0, holder=holder)
    with pytest.raises(StaleLease, match="which began later"):
        tiers.begin(0, attempt=1, holder=earlier)
    tiers.drop_run(RUN)
    tiers.begin(0, holder=earlier)
    assert tiers.statistics()["stale_leases"] == 1


def test_a_lease_of_another_incarnation_is_refused_and_counted(tiers_in):
    tiers = tiers_in(2)
    use(tiers.begin(0))
    for refused in ((1, 1, tiers.incarnation), (0, 2, tiers.incarnation), (0, 1, "another store")):
        with pytest.raises(StaleLease):
            tiers.complete(RUN, 0, *refused)
    tiers.end(0)
    assert tiers.statistics()["stale_leases"] == 3


def test_a_holder_that_gives_up_loses_what_it_has_not_completed(tiers_in):
    tiers = tiers_in(4)
    use(tiers.begin(0, holder="dead"), upto=5)
    tiers.give_up(RUN, "dead")
    assert (tiers.entries(), tiers.host(), tiers.statistics()["bytes"]["disk"]) == (0, 0, 0)
    with pytest.raises(StaleLease):
        tiers.end(0, holder="dead")
    tiers.make(0, attempt=1, holder=this_process())
    tiers.begin(1, holder=this_process())
    tiers.give_up(RUN, this_process())
    keys = [write.key for write in PLAN.segments[0].writes]
    assert tiers.missing([*keys, ("no", "such")]) == [("no", "such")]
    assert tiers.statistics()["orphans"] == 0


# The disk


class Syncs(files.Disk):
    """Records what is synced; an errno in place of a list fails each sync."""

    def __init__(self, synced):
        self.synced = synced

    def fsync(self, descriptor):
        if self.synced is errno.EIO:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        super().fsync(descriptor)


def test_a_complete_segment_is_synced_and_nothing_before(tiers_in):
    tiers = tiers_in(2)
    store = tiers.begin(0)
    with files.swapped(Syncs(synced := [])):
        use(store)
        store.finish()
        assert synced == []
        tiers.end(0)
    assert len(set(synced)) == sum(op.writes for op in store.ops) + 1, "every file, and the folder"


def test_a_segment_that_cannot_be_synced_is_not_complete(tiers_in):
    tiers = tiers_in(2)
    use(tiers.begin(0))
    with files.swapped(Syncs(errno.EIO)), pytest.raises(OSError, match="Input/output"):
        tiers.end(0)
    tiers.make(0, attempt=1)


@pytest.mark.parametrize("trouble", ["none", "no folder", "no listing"])
def test_a_store_closes_whatever_its_folder_does_and_refuses_every_call_from_then_on(tiers_in, trouble):
    tiers = tiers_in(2)
    if trouble == "no folder":
        shutil.rmtree(tiers.disk.files.directory)
    with files.swapped(NoListing() if trouble == "no listing" else files.disk):
        tiers.close()
    assert not tiers.arena.path.exists()
    with pytest.raises(StaleLease, match="closed"):
        tiers.begin(0)
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
        tiers.complete(RUN, chunk, 0, 1, tiers.incarnation)
    assert read == 2 * (1 + 2 * (chunks - 2))
    assert tiers.statistics()["counts"]["tier_lookups", "disk", "hit"] > 0
    tiers.close()
