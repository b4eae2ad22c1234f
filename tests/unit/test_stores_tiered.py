"""The tiered store: what is in the way goes down in order, budgets hold, and whatever comes back is what was put."""

import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache import CPUOffloadStore, DiskOffloadStore, GPUStore, TieredStore
from edit_ray.cache.stores.eviction import EvictionPolicy
from tests.unit.entry_folder import bytes_of, files_in, on_disk


def tiers(path, *budgets, **options):
    stores = [GPUStore(), CPUOffloadStore(), on_disk(path)]
    return TieredStore(list(zip(stores, budgets, strict=False)), **options)


def test_the_least_recently_used_spills_tier_by_tier_and_out_of_the_last(tmp_path):
    store = tiers(tmp_path, 2, 2, 2)
    where = {}
    for name in "abcdefg":
        store.put((name,), bytes_of(1, ord(name)))
        where[name] = [store.tier_of((other,)) for other in "abcdefg"[: ord(name) - 96]]
    assert where["c"] == ["host", "device", "device"]
    assert where["e"] == ["disk", "host", "host", "device", "device"]
    assert where["g"] == [None, "disk", "disk", "host", "host", "device", "device"]
    assert (store.num_spills, store.num_evictions, store.num_refused) == (5 + 3, 1, 0)
    assert store.tier_bytes == {"device": 2, "host": 2, "disk": 2}
    assert torch.equal(store.get(("b",)), bytes_of(1, ord("b")))
    assert [store.tier_of((name,)) for name in "bcdefg"] == ["device", "disk", "disk", "host", "host", "device"]


def test_without_promotion_what_is_read_stays_where_it_is(tmp_path):
    store = tiers(tmp_path, 1, 2, None, promote=False)
    for name in "abcd":
        store.put((name,), bytes_of(1, ord(name)))
    for name in "bab":
        assert torch.equal(store.get((name,)), bytes_of(1, ord(name)))
    assert [store.tier_of((name,)) for name in "abcd"] == ["disk", "host", "host", "device"]
    store.put(("e",), bytes_of(1))  # b was used after c
    assert [store.tier_of((name,)) for name in "abcde"] == ["disk", "host", "disk", "host", "device"]


def test_what_a_tier_cannot_hold_goes_to_the_next_and_what_none_can_is_refused(tmp_path):
    store = tiers(tmp_path, 2, 4, 8)
    for name, size in (("small", 2), ("medium", 3), ("large", 8), ("huge", 9)):
        store.put((name,), bytes_of(size, size))
    assert [store.tier_of((name,)) for name in ("small", "medium", "large")] == ["device", "host", "disk"]
    assert store.get(("huge",)) is None
    assert (store.num_refused, store.num_spills, store.num_evictions) == (1, 0, 0)
    assert torch.equal(store.get(("large",)), bytes_of(8, 8))
    assert store.tier_of(("large",)) == "disk"


def test_prefetch_moves_up_what_is_used_first_as_far_as_the_first_tier_goes(tmp_path):
    store = tiers(tmp_path, 3, 2, None, promote=False)
    store.put(("too large",), bytes_of(4))
    for name in "abcdefgh":
        store.put((name,), bytes_of(1, ord(name)))
    store.prefetch([("too large",), ("unknown",), ("b",), ("h",), ("a",), ("c",), ("d",)])
    in_device = [name for name in "abcdefgh" if store.tier_of((name,)) == "device"]
    assert in_device == ["a", "b", "h"]
    store.put(("i",), bytes_of(1))  # what is used last makes way
    assert [name for name in "abh" if store.tier_of((name,)) == "device"] == ["b", "h"]
    assert all(torch.equal(store.get((name,)), bytes_of(1, ord(name))) for name in "abcdefgh")


def test_what_the_tiers_held_before_is_found_and_counted(tmp_path):
    for age, name in enumerate("cba"):
        known = set(files_in(tmp_path))
        on_disk(tmp_path).put((name,), bytes_of(2, ord(name)))
        (path,) = set(files_in(tmp_path)) - known
        os.utime(path, (10 - age, 10 - age))
    assert list(on_disk(tmp_path).sizes()) == [("a",), ("b",), ("c",)]
    store = tiers(tmp_path, 2, 2, 4)
    assert store.num_evictions == 1
    assert store.tier_bytes == {"device": 0, "host": 0, "disk": 4}
    assert store.get(("a",)) is None
    assert torch.equal(store.get(("b",)), bytes_of(2, ord("b")))
    assert store.tier_of(("b",)) == "device"

    host, disk = CPUOffloadStore(), on_disk(tmp_path / "other")
    host.put(("a",), bytes_of(1, 1))
    disk.put(("a",), bytes_of(1, 2))
    store = TieredStore([(host, 1), (disk, 1)])
    assert (len(store), store.bytes_resident, len(disk)) == (1, 1, 0)
    assert torch.equal(store.get(("a",)), bytes_of(1, 1))


def test_what_a_tier_loses_by_itself_is_a_miss(tmp_path):
    store = tiers(tmp_path, 1, 0, None)
    for name in "ab":
        store.put((name,), bytes_of(1))
    (file,) = files_in(tmp_path)
    file.unlink()
    assert store.get(("a",)) is None
    assert (len(store), store.tier_of(("a",)), store.tier_bytes["disk"]) == (1, None, 0)


def test_tiers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="The tiers are none"):
        TieredStore([])
    with pytest.raises(ValueError, match="The tiers are host, host"):
        TieredStore([(CPUOffloadStore(), 1), (CPUOffloadStore(), 1)])


NAMES = st.integers(0, 7)


@settings(max_examples=150, deadline=None)
@given(
    budgets=st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 12)),
    promote=st.booleans(),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), NAMES, st.integers(0, 9)),
            st.tuples(st.sampled_from(["get", "drop"]), NAMES),
            st.tuples(st.just("prefetch"), NAMES | st.lists(NAMES, max_size=6)),
        ),
        max_size=25,
    ),
)
def test_tiers_keep_their_budgets_and_account_for_every_entry(budgets, promote, steps):
    with tempfile.TemporaryDirectory() as folder:
        stores = [GPUStore(), CPUOffloadStore(), on_disk(folder)]
        store = TieredStore(list(zip(stores, budgets, strict=True)), promote=promote)
        last, removed = {}, 0
        for fill, (action, name, *size) in enumerate(steps):
            before = len(store)
            if action == "put":
                removed += store.tier_of((name,)) is not None
                last[name] = bytes_of(size[0], fill)
                store.put((name,), last[name])
            elif action == "get":
                held, found = store.tier_of((name,)), store.get((name,))
                assert (found is None) == (held is None)
                assert found is None or torch.equal(found, last[name])
            elif action == "drop":
                store.drop((name,))
                removed += before - len(store)
            else:
                store.prefetch((name,) if isinstance(name, int) else [(key,) for key in name])
            assert list(store.tier_bytes.values()) == [one.bytes_resident for one in stores]
            assert all(one.bytes_resident <= budget for one, budget in zip(stores, budgets, strict=True))
            assert len(files_in(folder)) == len(stores[2])
        puts = sum(step[0] == "put" for step in steps)
        assert puts == len(store) + removed + store.num_evictions + store.num_refused
        assert sum(len(one) for one in stores) == len(store)


@settings(max_examples=100, deadline=None)
@given(
    budgets=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
    steps=st.lists(st.tuples(st.sampled_from(["put", "get"]), NAMES), max_size=30),
)
def test_equal_sizes_lie_in_the_order_of_their_last_use(budgets, steps):
    with tempfile.TemporaryDirectory() as folder:
        store = tiers(folder, *budgets)
        recent = []  # newest first
        for action, name in steps:
            if action == "put":
                store.put((name,), bytes_of(1))
            elif store.get((name,)) is None:
                continue
            recent = [name, *(other for other in recent if other != name)]
            recent = recent[: sum(budgets)]
            expected = [
                tier for tier, budget in zip(("device", "host", "disk"), budgets, strict=True) for _ in range(budget)
            ]
            assert [store.tier_of((other,)) for other in recent] == expected[: len(recent)]
        assert len(store) == len(recent)


# Other choices of victims


class Biggest(EvictionPolicy):
    """What is biggest goes first: from outside of the package, and told the sizes by the keys."""

    def order(self, key):
        return (-key[1],)

    def touch(self, key): ...

    def read(self, key): ...

    def forget(self, key): ...


def test_victims_are_chosen_by_whatever_is_given(tmp_path):
    store = tiers(tmp_path, 5, None, eviction=Biggest())
    for size in (1, 3, 2):
        store.put(("entry", size), bytes_of(size))
    assert [store.tier_of(("entry", size)) for size in (1, 2, 3)] == ["device", "device", "host"]
    with pytest.raises(ValueError, match="no eviction policy named 'lifo'; there are lru"):
        tiers(tmp_path, 1, eviction="lifo")
    with pytest.raises(ValueError, match="no eviction policy named 3; there are lru"):
        tiers(tmp_path, 1, eviction=3)


# Stores that fail


class SmallDisk(DiskOffloadStore):
    """A disk that is full before its budget is: it takes two entries."""

    def put(self, key, tensor):
        self.drop(key)
        if len(self) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().put(key, tensor)


def test_a_disk_that_is_full_below_its_budget_lets_the_oldest_go(tmp_path):
    store = TieredStore([(GPUStore(), 1), (SmallDisk(tmp_path, allow_tmpfs=True), 100)])
    for name in "abcd":
        store.put((name,), bytes_of(1, ord(name)))
    assert [store.tier_of((name,)) for name in "abcd"] == [None, "disk", "disk", "device"]
    assert store.drops == {"evicted": 1}
    store.put(("large",), bytes_of(2, 5))  # straight to the disk
    assert [store.tier_of((name,)) for name in "bcd"] == [None, None, "device"]
    assert torch.equal(store.get(("large",)), bytes_of(2, 5))
    store.put(("larger",), bytes_of(50, 6))
    assert store.tier_of(("larger",)) == "disk"


class NoDisk(GPUStore):
    """Takes nothing: full, or broken."""

    tier = "disk"

    def __init__(self, error):
        super().__init__()
        self.error = error

    def put(self, key, tensor):
        raise self.error


def test_what_a_full_disk_refuses_twice_is_dropped_and_counted():
    store = TieredStore([(GPUStore(), 1), (NoDisk(OSError(errno.ENOSPC, "full")), 100)])
    store.put(("a",), bytes_of(1))
    store.put(("b",), bytes_of(1))
    store.put(("large",), bytes_of(2))
    assert [store.tier_of((name,)) for name in ("a", "b", "large")] == [None, "device", None]
    assert store.drops == {"full": 2}
    assert store.tier_bytes == {"device": 1, "disk": 0}


def test_an_error_of_a_store_reaches_the_caller_and_the_accounts_stay_right():
    device, disk = GPUStore(), NoDisk(RuntimeError("unplugged"))
    store = TieredStore([(device, 1), (disk, 100)])
    store.put(("a",), bytes_of(1))
    with pytest.raises(RuntimeError, match="unplugged"):
        store.put(("b",), bytes_of(1))
    with pytest.raises(RuntimeError, match="unplugged"):
        store.put(("large",), bytes_of(2))
    assert store.tier_bytes == {"device": device.bytes_resident, "disk": 0}
    assert (store.get(("large",)), len(store)) == (None, device.bytes_resident)
    store.put(("c",), bytes_of(1, 3))
    assert torch.equal(store.get(("c",)), bytes_of(1, 3))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e4m3fnuz], ids=str)
def test_a_type_that_a_lower_tier_refuses_is_refused_when_it_is_put(tmp_path, dtype):
    store = tiers(tmp_path, 8, 8, None)
    store.put(("a",), bytes_of(4))
    store.put(("b",), bytes_of(4))
    with pytest.raises(ValueError, match=rf"^The tier disk does not take {dtype}: .* it can hold torch"):
        store.put(("a",), torch.zeros(1, dtype=dtype))
    assert store.get(("a",)) is None
    for name in "cdefg":
        store.put((name,), bytes_of(4, 1))
    assert torch.equal(store.get(("b",)), bytes_of(4))


def test_threads_take_turns(tmp_path):
    store = tiers(tmp_path, 40, 40, 40)

    def work(thread):
        for number in range(150):
            key = (number % 12,)
            store.put(key, bytes_of(8, key[0]))
            found = store.get(((number + thread) % 12,))
            assert found is None or (found == (number + thread) % 12).all()
            if number % 10 == thread:
                store.drop(key)
                store.prefetch((3,))

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, thread) for thread in range(4)]:
            done.result()
    assert all(size <= 40 for size in store.tier_bytes.values())
    assert sum(store.sizes().values()) == store.bytes_resident
