"""Random histories of a run over the shared tiers, with faults: no wrong tensor, never over budget, all adds up."""

import errno
import functools
import itertools
import shutil
import time
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edit_ray import files
from edit_ray.errors import EntryLost, StaleLease
from edit_ray.tiers import service
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.disk_tier import DiskTier, FolderTaken, FolderUnusable
from edit_ray.tiers.leases import Reuse
from edit_ray.tiers.protocol import EntryForm
from edit_ray.tiers.reuse_plan import make_reuse_plan
from edit_ray.tiers.service import TABLES_BYTES, TierService
from edit_ray.tiers.store_client import PlannedStore
from tests.unit.entry_folder import Faults, files_in, lost

RUN, EXPERT, SHAPE = "run", "transformer", (1, 16, 16)
SIZE, SEGMENTS = 16 * 16 * 4, 5
FORM = EntryForm(torch.device("cpu"), torch.float32, SHAPE)
FAULTS = st.tuples(
    st.sampled_from(["open", "write", "read", "rename"]), st.sampled_from([errno.EIO, errno.ENOSPC, errno.EINVAL])
)


@functools.cache
def plan_of(window, warm_steps):
    return make_reuse_plan(
        RUN, SEGMENTS, window=window, warm_steps=warm_steps, experts=[EXPERT] * 4, unit_bytes={EXPERT: [SIZE]}
    )


class Histories(RuleBasedStateMachine):
    """A run that is made segment by segment, with everything that may happen in between."""

    folder = None  # given by the test
    fired: dict[str, int]
    hung: ClassVar = {}  # holders that were replaced and may still write, with what they were given

    @initialize(entries=st.integers(1, 4), window=st.integers(1, 3), warm_steps=st.integers(1, 3))
    def begin(self, entries, window, warm_steps):
        shutil.rmtree(self.folder / "disk", ignore_errors=True)
        self.entries, self.plan, self.calls = entries, plan_of(window, warm_steps), Faults()
        self.tiers = self.store = None
        self.written, self.versions = {}, itertools.count(1)  # what complete segments have written
        self.segment, self.attempt, self.holder = 0, 0, 0
        self.hung.clear()
        self.open_store()

    def count(self, name):
        self.fired[name] = self.fired.get(name, 0) + 1

    def open_store(self):
        files.disk, hits = self.calls, self.calls.hits
        try:
            disk = DiskTier(self.folder / "disk", allow_tmpfs=True)
        except FolderUnusable as error:  # which ends a run with a sentence; a resumed one has the store made again
            if isinstance(error, FolderTaken) or self.calls.hits == hits:
                raise
            self.count("store refused")
            disk = DiskTier(self.folder / "disk", allow_tmpfs=True)
        arena = Arena.create(self.entries * 4096 + TABLES_BYTES, self.folder)
        self.tiers = TierService(arena, {4096: self.entries}, disk)
        self.tiers.follow(self.plan.uses(), self.segment)
        self.store = None

    def prepare(self, segment, attempt):
        ops = Reuse(self.plan, FORM).ops(segment)
        lease = self.tiers.prepare(RUN, segment, attempt, self.holder, ops)
        return PlannedStore(self.tiers.arena, lease.table, ops, prefix=(RUN,), timeout_s=30)

    def make_again(self):
        """The segment's attempt has failed."""
        self.store, self.attempt = None, self.attempt + 1

    @rule(number=st.integers(1, 20))
    def use(self, number):
        """Some of the segment's reads and writes."""
        if self.segment == SEGMENTS:
            return
        if self.store is None:
            self.store, self.next, self.drafts = self.prepare(self.segment, self.attempt), 0, {}
        try:
            for op in self.store.ops[self.next : self.next + number]:
                self.end_hung_ones_if_in_the_way(self.next)
                self.next += 1
                if op.writes:
                    value = float(next(self.versions))
                    self.store.put(op.key[1:], torch.full(SHAPE, value))
                    self.drafts[op.key] = value
                    self.count("write")
                else:
                    read = self.store.get(op.key[1:])
                    assert torch.equal(read, torch.full(SHAPE, self.written[op.key])), "a wrong tensor"
                    self.count("read")
        except EntryLost:
            self.count("lost")
            if not self.calls.hits and not lost(self.tiers.disk):
                raise
            self.make_again()

    @rule()
    def complete(self):
        """The segment is made, or cannot be saved and is made again."""
        if self.store is None or self.next < len(self.store.ops):
            return
        self.store.finish()
        try:
            self.tiers.complete(RUN, self.segment, self.attempt, self.holder, self.tiers.incarnation)
        except OSError:
            self.count("complete, failed")
            assert self.calls.hits
            self.make_again()
            return
        self.count("complete")
        self.written |= self.drafts
        self.segment, self.attempt, self.store = self.segment + 1, 0, None

    @rule(number=st.integers(1, 3), ahead=st.booleans())
    def make_segments(self, number, ahead):
        """Whole segments, so that histories come further than the first."""
        for _ in range(number):
            self.use(1)
            if ahead:
                self.ask_ahead()
            self.use(100)
            self.complete()

    @rule()
    def reply_is_lost(self):
        """The last segment is complete, and nobody has heard of it: it is made again."""
        if self.store is None and self.attempt == 0 and self.segment > 0 and self.written:
            self.segment, self.attempt = self.segment - 1, 1
            self.count("reply lost")

    @rule()
    def ask_ahead(self):
        if self.store is not None and self.segment + 1 < SEGMENTS:
            self.prepare(self.segment + 1, 0)
            self.count("ahead")

    @rule()
    def gpu_actor_dies(self):
        """The store hears of it when the next one asks."""
        stale = self.attempt, self.holder
        self.holder += 1
        self.make_again()
        self.use(0)
        if self.segment < SEGMENTS:
            with pytest.raises(StaleLease):
                self.tiers.complete(RUN, self.segment, *stale, self.tiers.incarnation)
        self.count("gpu actor dies")

    @rule()
    def gpu_actor_gives_up(self):
        self.tiers.give_up(RUN, self.holder)
        if self.segment < SEGMENTS:
            with pytest.raises(StaleLease):
                self.tiers.complete(RUN, self.segment, self.attempt, self.holder, self.tiers.incarnation)
        self.make_again()
        self.count("gpu actor gives up")

    @rule(number=st.integers(0, 3), more=st.integers(0, 20))
    def gpu_actor_hangs(self, number, more):
        """Another has its run now; its process is not seen to be gone, and writes into what it was given."""
        self.use(number)
        if self.store is None:
            return
        self.hung[self.holder] = self.store, self.next
        self.holder += 1
        self.make_again()
        self.count("gpu actor hangs")
        self.use(0)
        with pytest.raises(StaleLease):
            self.tiers.complete(RUN, self.segment, self.attempt, self.holder - 1, self.tiers.incarnation)
        self.use(more)

    def hung_ones_write(self):
        for store, used in self.hung.values():
            for index in range(used, len(store.ops)):
                offset = store.table.place(index) if store.ops[index].writes else None
                if offset is not None and offset >= 0:
                    store.arena.tensor(offset, torch.float32, SHAPE).fill_(-1.0)
                    self.count("hung one writes")

    def end_hung_ones_if_in_the_way(self, index):
        """What waits for their room gets it when they are gone."""
        self.hung_ones_write()
        deadline = time.monotonic() + 0.003
        while self.hung and self.store.table.place(index) == -1:
            if time.monotonic() > deadline:
                self.hung.clear()
                self.count("hung ones end")

    @rule(fault=st.none() | FAULTS)
    def store_dies(self, fault):
        self.hung.clear()
        self.tiers.close()
        self.calls.next = fault
        self.open_store()
        self.make_again()
        self.count("store dies")

    @rule(fault=FAULTS)
    def fault(self, fault):
        self.calls.next = fault
        self.count("fault")

    @rule(which=st.integers(0, 9), where=st.integers(0, 9999))  # not of what is there: threads write it
    def damage(self, which, where):
        """A byte of a file turns over; an entry may be gone for good, and the run begins anew."""
        files = sorted((self.folder / "disk").glob("*.safetensors"))
        if not files:
            return
        path = files[which % len(files)]
        content = bytearray(path.read_bytes())
        content[where % len(content)] ^= 0xFF
        path.write_bytes(content)
        self.use(100)
        self.count("damage")
        self.tiers.drop_run(RUN)
        self.written, self.segment, self.attempt, self.store = {}, 0, 0, None
        self.tiers.follow(self.plan.uses())
        assert self.tiers.statistics()["entries_in"]["disk"] == 0

    @invariant()
    def all_adds_up(self):
        if self.tiers is not None:
            assert self.tiers.statistics()["peak_bytes"]["host"] <= self.entries * 4096

    def teardown(self):
        if self.tiers is None:
            return
        self.calls.next = None
        self.hung.clear()
        self.tiers.drop_run(RUN)
        deadline = time.monotonic() + 60
        while (figures := self.tiers.statistics())["orphans"] or figures["bytes"]["host"]:
            time.sleep(0.001)  # an entry that is being loaded keeps its slot until then
            assert time.monotonic() < deadline, "a slot is lost"
        counts = figures["counts"]
        ended = sum(number for name, number in counts.items() if name[0] == "prefetches")
        assert (figures["entries_in"]["disk"], counts["prefetches_requested",]) == (0, ended)
        self.tiers.close()
        unread = self.tiers.disk.files.faults["read"]  # at the start such a file is not known, and stays
        assert unread or files_in(self.folder / "disk") == [], "what is dropped leaves no file"


EVERYTHING = {"write", "read", "lost", "complete", "complete, failed", "ahead", "fault", "damage"}
EVERYTHING |= {"gpu actor hangs", "hung one writes", "hung ones end", "gpu actor dies", "gpu actor gives up"}
EVERYTHING |= {"store dies", "store refused", "reply lost"}


def happened_in(folder, number, monkeypatch):
    """What so many histories have met, each of which is checked at every step."""
    fired = {}
    monkeypatch.setattr(service, "_GONE_POLL_S", 0.001)
    monkeypatch.setattr(service, "is_gone", lambda holder: holder not in Histories.hung)
    kind = type("Machine", (Histories,), {"folder": folder, "fired": fired})
    given = {"max_examples": number, "stateful_step_count": 20, "deadline": None, "database": None, "derandomize": True}
    kind.TestCase.settings = settings(**given)
    kind.TestCase("runTest").runTest()
    print(fired)
    assert list(folder.glob("edit_ray-*")) == []
    return set(fired)


@pytest.mark.parametrize("number", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_histories(tmp_path, monkeypatch, number):
    assert happened_in(tmp_path, number, monkeypatch) == EVERYTHING
