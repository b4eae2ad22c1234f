"""The stores: what was put is got bit for bit or not at all, budgets hold, and what is in the way goes in order."""

from pathlib import Path

import pytest
import torch

from edit_ray.cache import CPUOffloadStore, DiskOffloadStore, GPUStore, TieredStore
from tests.unit.entry_folder import bytes_of, files_in, on_disk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(params=["device", "host", "disk", "tiered", "tiered on disk"])
def store(request, tmp_path):
    """Every kind of store; the tiered ones use all their tiers, or must put everything into the last."""
    tiers = [(GPUStore(), 100), (CPUOffloadStore(), 200), (on_disk(tmp_path), None)]
    return {
        "device": tiers[0][0],
        "host": tiers[1][0],
        "disk": tiers[2][0],
        "tiered": TieredStore(tiers),
        "tiered on disk": TieredStore([(tiers[0][0], 0), tiers[2]]),
    }[request.param]


def test_the_least_recently_used_is_evicted_first_and_what_is_larger_than_the_budget_refused():
    store = CPUOffloadStore(budget_bytes=3)
    for name in "abc":
        store.put((name,), bytes_of(1))
    store.get(("a",))
    store.put(("d",), bytes_of(1))
    store.put(("large",), bytes_of(4))
    assert list(store.sizes()) == [("c",), ("a",), ("d",)]
    assert (store.num_evictions, store.num_refused, store.bytes_resident) == (1, 1, 3)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    store = on_disk(tmp_path)
    store.put(("a",), torch.zeros(3))
    with pytest.raises(NotImplementedError):
        store.put(("a",), torch.zeros(3, device="meta"))
    with pytest.raises(TypeError):
        store.put((1.5,), torch.zeros(3))
    assert (files_in(tmp_path), len(store), store.bytes_resident) == ([], 0, 0)
    store.put(("b",), torch.zeros(3))
    (in_the_way,) = files_in(tmp_path)
    store.clear()
    in_the_way.mkdir()
    with pytest.raises(OSError, match="directory"):
        store.put(("b",), torch.zeros(3))
    assert (files_in(tmp_path), len(store), store.get(("b",))) == ([in_the_way], 0, None)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file"):
        DiskOffloadStore(tmp_path / "file")


def test_large_tensors_come_back_from_host_memory_and_their_pages_go_with_them():
    store, generator = CPUOffloadStore(8 << 20), torch.Generator().manual_seed(1)
    turned = torch.randn(600, 1000, generator=generator).t()
    for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool):
        tensor = (turned * 50).to(dtype)
        store.put(("turned",), tensor)
        found = store.get(("turned",))
        assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, tensor.shape, True)
        assert torch.equal(found, tensor)
    store.clear()
    del found

    def own_memory():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
        return int(line.split()[1]) * 1024

    torch.ones(4 << 20, dtype=torch.uint8)  # once such a block was freed, the C library keeps the next ones
    for number in range(4):
        store.put((number,), torch.ones(2 << 20, dtype=torch.uint8))
    above = torch.ones(2 << 20, dtype=torch.uint8)
    before = own_memory()
    store.clear()
    assert before - own_memory() > 7 << 20
    assert above.all()


@pytest.mark.parametrize("budget", [float("nan"), 1.5, True, "1GB", -1], ids=str)
def test_a_budget_is_a_whole_number_of_bytes(budget):
    for make in (CPUOffloadStore, lambda budget: TieredStore([(GPUStore(), budget)])):
        with pytest.raises(ValueError, match=rf"whole number of bytes from 0, or None .*; got {budget!r}$"):
            make(budget)


@pytest.mark.parametrize("key", [("a", 1.5), ("a", b"b"), "a", (("a",),), ["a"]], ids=str)
def test_what_is_no_key_is_refused_by_every_store_alike(store, key):
    with pytest.raises(
        TypeError, match=r"^A key is a tuple of str, int and None; got .*, a (float|bytes|str|tuple|list)\.$"
    ):
        store.put(key, torch.zeros(3))
    assert len(store) == 0


@pytest.mark.parametrize(("kind", "live"), [("device", True), ("host", True), ("disk", False)])
def test_which_store_returns_its_own_tensor_and_which_a_copy(kind, live, tmp_path):
    store = {"device": GPUStore(), "host": CPUOffloadStore(), "disk": on_disk(tmp_path)}[kind]
    put = torch.zeros(4)
    store.put(("a",), put)
    one, other = store.get(("a",)), store.get(("a",))
    put += kind != "device"  # a later change of the tensor does not reach the others
    assert torch.equal(one, torch.zeros(4))
    assert (one.data_ptr() == other.data_ptr()) == live
    assert (one.data_ptr() == put.data_ptr()) == (kind == "device")
