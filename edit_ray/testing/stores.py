"""The contract of a `CacheStore`, for the tests of other implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch

from edit_ray.cache.stores.base import CacheStore
from edit_ray.tiers.reuse_plan import Key

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
# A careless text or hash of a key would confuse pairs of these.
_KEYS: tuple[Key, ...] = (
    *((), ("",), (None,), ("None",), (0,), ("0",), (1, 23), (12, 3), ("a", "b"), ("b", "a"), ("a,b",), ("a/b",)),
    *(("a", None, "b"), (-1,), (-2,), (2**70,), ("é\n\0", "../x"), ("run", 3, "transformer", "cond", "stack", 7)),
)


def check_store(make_store: Callable[[], CacheStore], *, may_forget: bool = False) -> None:
    """Assert the contract of `CacheStore`: what was put last comes back, bit for bit, or nothing does.

    `make_store` returns a new, empty store at each call. With `may_forget`, `get` may return None for anything; without
    it, the store must hold all that is put here, which is less than a megabyte. Raises AssertionError.

    Examples:
        >>> def test_my_store():
        ...     check_store(MyStore)
    """
    for check in (_check_tensors, _check_keys, _check_replacing, _check_dropping):
        check(_Checked(make_store(), may_forget))


class _Checked:
    """A store beside a dict with its expected content."""

    def __init__(self, store: CacheStore, may_forget: bool) -> None:
        self.store, self.may_forget = store, may_forget
        self.put_last: dict[Key, torch.Tensor] = {}
        self.got: list[tuple[Key, torch.Tensor, torch.Tensor]] = []

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        self.put_last[key] = tensor.clone(memory_format=torch.contiguous_format)
        self.store.put(key, tensor)

    def drop(self, key: Key) -> None:
        self.put_last.pop(key, None)
        self.store.drop(key)

    def get(self, key: Key) -> None:
        """Check what the store returns, now and again in `finish`."""
        found, expected = self.store.get(key), self.put_last.get(key)
        if expected is None:
            assert found is None, f"get({key!r}) must be None: nothing was put there, or it was dropped."
        elif found is None:
            assert self.may_forget, f"get({key!r}) is None, but something was put there; was may_forget=True meant?"
        else:
            _assert_same(key, found, expected, "what was put last")
            self.got.append((key, found, expected))

    def finish(self) -> None:
        """Check that every entry is still there, and that no returned tensor has changed since."""
        for key in self.put_last:
            self.get(key)
        for key, found, expected in self.got:
            _assert_same(key, found, expected, "what it was when `get` returned it")


def _check_tensors(checked: _Checked) -> None:
    for dtype in _DTYPES:
        for name, tensor in _tensors(dtype):
            checked.put((str(dtype), name), tensor)
            checked.get((str(dtype), name))
    checked.finish()


def _check_keys(checked: _Checked) -> None:
    for number, key in enumerate(_KEYS):
        checked.get(key)
        checked.put(key, torch.full((3,), number))
    checked.store.prefetch([*_KEYS, ("unknown",)])
    checked.finish()


def _check_replacing(checked: _Checked) -> None:
    tensors = [tensor for dtype in (torch.uint8, torch.float32) for _, tensor in _tensors(dtype)]
    for first, second in combinations(tensors, 2):
        for tensor in (first, second, first):
            checked.put(("a",), tensor)
            checked.get(("a",))
    checked.finish()


def _check_dropping(checked: _Checked) -> None:
    keys: list[Key] = [("run", number, None) for number in range(6)]
    for number, key in enumerate(keys):
        checked.put(key, torch.full((4,), number))
    for key in (("unknown", None), keys[0], keys[0], keys[1]):
        checked.drop(key)
        checked.get(key)
    checked.finish()
    checked.store.clear()
    checked.put_last.clear()
    for key in keys:
        checked.get(key)
    checked.put(keys[0], torch.ones(4))  # cleared, not closed
    checked.finish()


def _tensors(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of every layout; floats hold infinities, NaN, −0 and subnormals among random bits."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, (3, 5, 4), generator=generator).bool()
    else:
        raw = torch.randint(0, 256, (60 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensor = raw.view(dtype).view(3, 5, 4)
    if dtype.is_floating_point:
        tiny = torch.finfo(dtype).smallest_normal / 2
        tensor[0, 0] = torch.tensor([float("inf"), float("nan"), -0.0, tiny]).to(dtype)
    yield "contiguous", tensor
    yield "transposed", tensor.transpose(0, 2)
    yield "strided", tensor[1, ::2, 1:3]
    yield "expanded", tensor[:1].expand(4, 5, 4)
    yield "one number", tensor[2, 4, 3]
    yield "no rows", tensor[:0]
    yield "no columns", tensor[:, :, :0]


def _assert_same(key: Key, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    for name, of in (("dtype", lambda tensor: tensor.dtype), ("shape", lambda tensor: tuple(tensor.shape))):
        assert of(found) == of(expected), f"get({key!r}) has the {name} {of(found)}; {what} has {of(expected)}."
    bits, expected_bits = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (found, expected))
    assert torch.equal(bits, expected_bits), f"get({key!r}) differs from {what}, compared bit by bit."
