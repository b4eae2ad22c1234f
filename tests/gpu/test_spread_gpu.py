"""Residuals in pinned memory on a CUDA device: what is read is what was put, however far the loop is ahead."""

import pytest
import torch

from edit_ray.cache.stores.spread import PinnedStore, SpreadStore
from tests.calls import AS_TRAINED, cached, latents, load

DEVICE = torch.device("cuda", 0)
UNITS, STEPS, KEPT = 8, 6, 2


def key(unit, step):
    return (0, "transformer", "cond", unit, step)


def value(unit, step):
    return float(1 + unit + UNITS * step)


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_is_read_is_what_was_put_last(ahead):
    store, matrix = PinnedStore(ahead), torch.randn(2048, 2048, device=DEVICE)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    matrix @ matrix
    before, size = torch.cuda.memory_allocated(), 4 << 20
    for step in range(STEPS):
        for unit in range(UNITS):
            for _ in range(5):
                matrix @ matrix  # the device is behind
            store.put(key(unit, step), torch.full((1 << 20,), value(unit, step), device=DEVICE))
            store.drop(key(unit, step - KEPT))
        for _ in range(3):
            for unit in range(UNITS):
                for at in range(max(0, step - KEPT + 1), step + 1):
                    found = store.get(key(unit, at))
                    assert found.device == DEVICE
                    wrong += (found != value(unit, at)).sum()
    del found
    assert wrong.item() == 0
    assert torch.cuda.memory_allocated() - before <= (4 * ahead + 2) * size, "what was read has left the device"
    assert len(store) == UNITS * KEPT
    assert sum(len(free) for free in store._free.values()) <= UNITS


def test_latents_are_those_of_the_device_alone():
    pipe, made = load("builtin:tiny_wan", torch_dtype=torch.bfloat16, device="cuda"), []
    for store in (None, SpreadStore(0.5, ahead=2)):
        with cached(pipe, "taylorseer", 12, "per_block", store, cache_interval=3, max_order=2):
            made.append(latents(pipe, **AS_TRAINED, num_inference_steps=12))
    assert torch.equal(*made)
