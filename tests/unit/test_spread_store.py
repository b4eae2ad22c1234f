"""Residuals dealt out between device and host: who lives where, what is brought ahead, and no other latents."""

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.cache.stores.spread import PinnedStore, SpreadStore
from edit_ray.testing import save_random_wan


def key(unit, step=0, branch="cond"):
    return (0, "transformer", branch, unit, step)


@pytest.mark.parametrize(("share", "units"), [(0.0, []), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (1.0, list(range(8)))])
def test_units_on_the_host_are_evenly_spread_and_stay_there(share, units):
    store = SpreadStore(share)
    for step in range(2):
        for unit in range(8):
            store.put(key(unit, step), torch.zeros(1))
    on_host = [unit for unit in range(8) if store.tier_of(key(unit, 1)) == "host"]
    assert on_host == units
    assert store.tier_bytes == {"device": 8 * (8 - len(units)), "host": 8 * len(units)}


@pytest.mark.parametrize("given", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="host_share is"):
        SpreadStore(given)


def test_what_was_read_next_is_brought_ahead_and_a_changed_entry_is_not_read_old():
    store = PinnedStore(ahead=2)
    for unit in range(5):
        store.put(key(unit), torch.full((2,), unit))
    read = [key(unit) for unit in (3, 0, 4, 1)]
    for _ in range(2):
        for at in read:
            store.get(at)
    store.get(read[0])
    assert list(store._loaded) == read[1:3]
    store.put(read[1], torch.full((2,), 9))
    assert store.get(read[1]).tolist() == [9, 9]
    store.drop(read[2])
    assert store.get(read[2]) is None
    assert store.get(read[3]).tolist() == [1, 1]


def test_memory_of_what_was_dropped_is_used_again():
    store = PinnedStore()
    store.put(key(0), torch.zeros(4))
    memory = store._entries[key(0)].memory.data_ptr()
    store.drop(key(0))
    store.put(key(1), torch.ones(4))
    assert store._entries[key(1)].memory.data_ptr() == memory
    assert (len(store), store.bytes_resident, store.sizes()) == (1, 16, {key(1): 16})


def test_latents_are_those_of_the_device_alone(tmp_path):
    pipe = EditWanPipeline.from_pretrained(save_random_wan(tmp_path / "wan"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 8, "output_type": "latent"}
    made = []
    for store in (None, SpreadStore(0.5)):
        pipe.enable_cache("taylorseer", 8, "per_block", store, cache_interval=3, max_order=2)
        made.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).frames)
        pipe.disable_cache()
    assert torch.equal(*made)
