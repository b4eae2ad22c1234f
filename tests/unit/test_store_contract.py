"""`check_store` passes for every store of ours and for a small one from outside, and fails for each that is broken."""

import tempfile
from itertools import count

import pytest
import torch

from edit_ray.cache import CPUOffloadStore, DiskOffloadStore, GPUStore, TieredStore
from edit_ray.cache.stores.spread import PinnedStore, SpreadStore
from edit_ray.testing import check_store
from edit_ray.tiers.arena import Arena
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.slots import slot_bytes


class SmallStore:
    """Twenty lines from outside: everything a store needs, over a dict."""

    def __init__(self):
        self.entries = {}

    def put(self, key, tensor):
        self.entries[key] = tensor.clone()

    def get(self, key):
        return self.entries.get(key)

    def prefetch(self, keys):
        pass

    def drop(self, key):
        self.entries.pop(key, None)

    def clear(self):
        self.entries.clear()


class ArenaStore(SmallStore):
    """Entries in an arena, each behind the one before; with a disk tier they only pass through."""

    def __init__(self, arena, disk=None):
        super().__init__()
        self.arena, self.disk, self.end = arena, disk, 0

    def put(self, key, tensor):
        self.drop(key)
        size = slot_bytes(tensor.nbytes)
        offset, self.end = self.end, self.end + (0 if self.disk else size)
        self.arena.tensor(offset, tensor.dtype, tensor.shape).copy_(tensor)
        if self.disk:
            assert self.disk.write(key, self.arena.memory(offset, size), tensor.dtype, tensor.shape).result()
        self.entries[key] = (offset, tensor.dtype, tensor.shape)

    def get(self, key):
        if key not in self.entries:
            return None
        offset, dtype, shape = self.entries[key]
        if self.disk:
            entry = self.disk.read(key, self.arena.memory(offset, self.arena.size_bytes)).result()
            assert (entry.dtype, entry.shape) == (dtype, shape)
        return self.arena.tensor(offset, dtype, shape).clone()

    def drop(self, key):
        self.entries.pop(key, None)
        if self.disk:
            self.disk.drop(key)

    def clear(self):
        for key in list(self.entries):
            self.drop(key)


@pytest.fixture
def folder(tmp_path):
    """A new folder at each call."""
    numbers = count()
    return lambda: tmp_path / str(next(numbers))


def test_our_stores_and_a_small_one_from_outside_keep_the_contract(folder):
    check_store(SmallStore)
    check_store(GPUStore)
    check_store(CPUOffloadStore)
    check_store(PinnedStore)
    check_store(lambda: SpreadStore(0.5, ahead=1))
    check_store(lambda: DiskOffloadStore(folder(), allow_tmpfs=True))


@pytest.mark.parametrize("budgets", [(300, 500, None), (0, 0, None), (10**6, None, None)])
def test_tiers_keep_the_contract(folder, budgets):
    def make():
        stores = GPUStore(), CPUOffloadStore(), DiskOffloadStore(folder(), allow_tmpfs=True)
        return TieredStore(list(zip(stores, budgets, strict=True)))

    check_store(make)


@pytest.mark.parametrize("budget", [0, 40, 400])
def test_a_store_with_a_budget_may_forget_and_never_errs(budget):
    check_store(lambda: CPUOffloadStore(budget), may_forget=True)
    with pytest.raises(AssertionError, match="may_forget=True"):
        check_store(lambda: CPUOffloadStore(budget))


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_arena_keeps_the_contract_alone_and_over_a_disk_tier(folder, on_disk):
    with tempfile.TemporaryDirectory() as directory, Arena.create(8 << 20, directory) as arena:
        tiers = []

        def make():
            if on_disk:
                tiers.append(DiskTier(folder(), allow_tmpfs=True))
            return ArenaStore(arena, tiers[-1] if on_disk else None)

        check_store(make)
        for tier in tiers:
            tier.close()
            assert set(tier.files.faults.values()) == {0}


def put(change):
    """A `put` that changes the tensor."""
    return {"put": lambda store, key, tensor: SmallStore.put(store, key, change(tensor))}


def get(change):
    """A `get` that changes the tensor, if there is one."""

    def get(store, key):
        tensor = SmallStore.get(store, key)
        return None if tensor is None else change(tensor)

    return {"get": get}


def joined(method):
    return lambda store, key, *tensor: getattr(SmallStore, method)(store, "/".join(map(str, key)), *tensor)


def of_floats(change):
    return lambda tensor: change(tensor) if tensor.is_floating_point() else tensor


BUFFER = torch.empty(1 << 16, dtype=torch.uint8)
BROKEN = {
    "casts": get(lambda tensor: tensor.float() if tensor.dtype == torch.float64 else tensor),
    "has one buffer": get(lambda found: BUFFER[: found.nbytes].view(found.dtype).view(found.shape).copy_(found)),
    "loses the shape of a number": put(torch.atleast_1d),
    "reads memory in order": put(lambda given: given.as_strided(given.shape, torch.empty(given.shape).stride())),
    "cleans numbers": put(of_floats(torch.nan_to_num)),
    "loses the sign": put(of_floats(lambda tensor: tensor + 0)),
    "keeps the first": {"put": lambda store, key, tensor: store.entries.setdefault(key, tensor.clone())},
    "joins keys": {method: joined(method) for method in ("put", "get", "drop")},
    "insists on the key": {"drop": lambda store, key: store.entries.pop(key)},
    "drops nothing": {"drop": lambda store, key: None},
    "clears nothing": {"clear": lambda store: None},
    "ends when cleared": {"clear": lambda store: setattr(store, "entries", None)},
    "forgets on prefetch": {"prefetch": lambda store, keys: store.entries.clear()},
}
ERRORS = {"insists on the key": KeyError, "ends when cleared": AttributeError}


ALSO_IF_IT_MAY_FORGET = ["casts", "cleans numbers", "keeps the first", "joins keys", "drops nothing", "has one buffer"]


@pytest.mark.parametrize(
    ("broken", "may_forget"), [*((name, False) for name in BROKEN), *((name, True) for name in ALSO_IF_IT_MAY_FORGET)]
)
def test_a_broken_store_fails(broken, may_forget):
    with pytest.raises(ERRORS.get(broken, AssertionError)):
        check_store(type(broken, (SmallStore,), BROKEN[broken]), may_forget=may_forget)
