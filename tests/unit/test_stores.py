import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.stores.host import HostStore


def bytes_of(count: int, fill: int = 0) -> torch.Tensor:
    return torch.full((count,), fill, dtype=torch.uint8)


def test_what_was_put_is_got_bit_for_bit():
    store = HostStore()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        tensor = (torch.randn(3, 5, 4) * 10).to(dtype)
        store.put(("run", 1, None, str(dtype)), tensor.transpose(0, 2))
        assert torch.equal(store.get(("run", 1, None, str(dtype))), tensor.transpose(0, 2))
    assert store.get(("run", 2)) is None


def test_a_later_change_of_the_tensor_does_not_reach_the_store():
    store, tensor = HostStore(), torch.zeros(4)
    store.put(("a",), tensor)
    tensor += 1
    assert torch.equal(store.get(("a",)), torch.zeros(4))


def test_the_least_recently_used_goes_first():
    store = HostStore(budget_bytes=3)
    for name in "abc":
        store.put((name,), bytes_of(1))
    store.get(("a",))
    store.put(("d",), bytes_of(1))
    assert store.get(("b",)) is None
    assert store.get(("a",)) is not None
    assert store.num_evictions == 1


def test_what_is_larger_than_the_budget_is_refused_and_counted():
    store = HostStore(budget_bytes=3)
    store.put(("small",), bytes_of(2))
    store.put(("large",), bytes_of(4))
    assert store.get(("large",)) is None
    assert store.get(("small",)) is not None
    assert store.num_refused == 1


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="got -1"):
        HostStore(budget_bytes=-1)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(0, 12),
    steps=st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 4), st.integers(0, 6))),
)
def test_the_budget_holds_and_nothing_wrong_comes_back(budget, steps):
    store, last = HostStore(budget), {}
    for fill, (action, name, size) in enumerate(steps):
        key = ("run", name)
        if action == "put":
            last[key] = bytes_of(size, fill % 256)
            store.put(key, last[key])
        elif action == "drop":
            last.pop(key, None)
            store.drop(key)
        else:
            found = store.get(key)
            assert found is None or torch.equal(found, last[key])
        assert 0 <= store.bytes_resident <= budget
    store.drop_where(lambda key: True)
    assert store.bytes_resident == 0
