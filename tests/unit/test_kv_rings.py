"""Windows larger than the device: which layers stay, what is copied, and the bits of a resident window."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache import CPUOffloadStore
from edit_ray.cache.device_slots import AHEAD
from edit_ray.cache.kv import KVWindow
from edit_ray.cache.kv_retention import Similar, WindowSink
from edit_ray.cache.kv_rings import KVLayout, place_rings

SIZES = {"num_layers": 5, "batch": 2, "tokens": 3, "heads": 2, "head_dim": 4, "chunks": 4, "dtype": torch.float32}
LAYOUT = KVLayout(**SIZES, device=torch.device("cpu"), rotated_keys=True)
BRANCHES = ("cond", "uncond")
LAYERS = [(branch, layer) for branch in BRANCHES for layer in range(5)]
EACH = LAYOUT.ring_bytes + LAYOUT.rotated_bytes
BUFFERS = (AHEAD + 1) * LAYOUT.ring_bytes + LAYOUT.rotated_bytes


@pytest.mark.parametrize(("ring", "rotated"), [(4, 0), (4, 2)])
@pytest.mark.parametrize("count", range(1, 14))
def test_as_many_layers_stay_as_the_bytes_allow(count, ring, rotated):
    layers, each = [("cond", layer) for layer in range(count)], ring + rotated
    whole, shared = count * each, (AHEAD + 1) * ring + rotated
    least = min(whole, shared)
    for given_bytes in (-1, 0, least - 1, 1.5, True, "1GB"):
        with pytest.raises(ValueError, match=rf"kv_device_bytes is .*{given_bytes}.*from {least}, .* takes {whole}"):
            place_rings(layers, ring, rotated, given_bytes)
    assert place_rings(layers, ring, rotated, None) == place_rings(layers, ring, rotated, whole)
    assert place_rings(layers, ring, rotated, whole).resident == tuple(layers)
    for given_bytes in range(least, whole):
        placed = place_rings(layers, ring, rotated, given_bytes)
        assert sorted((*placed.resident, *placed.streamed)) == layers
        assert list(placed.resident) == sorted(placed.resident)
        assert list(placed.streamed) == sorted(placed.streamed)
        assert placed.buffers == AHEAD + 1 <= len(placed.streamed)
        taken = len(placed.resident) * each + shared
        assert taken <= given_bytes < taken + each


@pytest.mark.parametrize("count", range(3, 41))
def test_layers_in_host_memory_are_spread_evenly(count):
    layers = [("cond", layer) for layer in range(count)]
    for resident in range(1, count - AHEAD):
        placed = place_rings(layers, 1, 0, AHEAD + 1 + resident)
        if not placed.streamed:
            continue
        assert placed.resident[0] == layers[0], "nothing computes before the first"
        for start in range(count):
            for size in range(1, count - start + 1):
                here = sum(layer in placed.streamed for layer in layers[start : start + size])
                assert abs(here - size * len(placed.streamed) / count) < 1


class Twins:
    """A resident window and one with a bound, which are given the same; what attention sees is compared as it does."""

    def __init__(self, device_bytes, sink, retention=WindowSink, **options):
        made = {"sink_chunks": sink, "branches": BRANCHES, **options}
        self.whole = KVWindow(LAYOUT, retention(), **made)
        self.bounded = KVWindow(LAYOUT, retention(), **made, device_bytes=device_bytes)
        self.both = self.whole, self.bounded
        self.draw = torch.Generator().manual_seed(0)

    def drawn(self):
        return torch.randn(LAYOUT.entry_shape, generator=self.draw)

    def append(self, chunk, forwards=3, skipped=(), until=None):
        """A chunk of so many forwards; `skipped` ones are not computed, and after a layer `until` it is abandoned."""
        for window in self.both:
            window.begin(chunk, forwards)
        for forward in range(forwards):
            if forward in skipped:
                continue
            for window in self.both:
                window.finished = forward == forwards - 1
            for which in LAYERS:
                self.attend(which, *self.drawn())
                if until == which and (forward + chunk) % forwards == 0:
                    for window in self.both:
                        window.abandon()
                    return
        for window in self.both:
            window.complete()

    def attend(self, which, key, value):
        for window in self.both:
            window.write(*which, key, value)
            rotated, known = window.rotated(*which)
            if not known:
                rotated.copy_(window.window(*which)[0] * 2)
            rotated[:, window.slot] = key * 2
        for one, other in zip(*(window.window(*which) for window in self.both), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(*(window.rotated(*which)[0] for window in self.both))

    def check(self):
        assert self.whole.chunks == self.bounded.chunks
        assert self.whole.stored == self.bounded.stored
        for chunk in (*self.whole.chunks, *self.whole.stored):
            for branch, layer in LAYERS:
                assert torch.equal(*(window.get(chunk, layer, branch) for window in self.both))


ACTS = ["append", "append", "append", "skip", "fail", "drop", "clear", "replace", "hook", "park", "park", "unpark"]


@settings(max_examples=60, deadline=None)
@given(
    device_bytes=st.integers(BUFFERS, len(LAYERS) * EACH),
    sink=st.integers(0, 3),
    similar=st.booleans(),
    acts=st.lists(st.sampled_from(ACTS), min_size=4, max_size=14),
)
def test_a_bound_and_parking_change_no_bit(device_bytes, sink, similar, acts):
    if similar:
        twins = Twins(device_bytes, sink, lambda: Similar(1, stored_chunks=3), store=CPUOffloadStore())
    else:
        twins = Twins(device_bytes, sink)
    bounded = twins.bounded
    for chunk, act in enumerate(acts):
        held = bounded.chunks
        if act == "append":
            twins.append(chunk)
        elif act == "skip":
            twins.append(chunk, forwards=4, skipped=(0, 2))
        elif act == "fail":
            twins.append(chunk, until=LAYERS[chunk % len(LAYERS)])
        elif act == "hook" and held:  # an edit while a layer of the clean chunk is written
            edits = [edit_once(window, held[0], twins.drawn()) for window in twins.both[:1]]
            edits += [edit_once(bounded, held[0], edits[0][1])]
            removes = [window.on_write(hook) for window, (hook, _) in zip(twins.both, edits, strict=True)]
            twins.append(chunk)
            for remove in removes:
                remove()
        elif act == "park":
            bounded.park()
            assert bounded.device_bytes == 0
            assert {entry.tier for entry in bounded.entries() if entry.chunk in held} <= {"host"}
        elif act == "unpark":
            bounded.unpark()
        elif act == "replace" and held:
            key, value = twins.drawn()
            for window in twins.both:
                window.replace(held[chunk % len(held)], chunk % 5, key, value, BRANCHES[chunk % 2])
        elif act in ("drop", "clear") and held:
            for window in twins.both:
                window.clear() if act == "clear" else window.drop(held[chunk % len(held)])
        assert bounded.device_bytes <= device_bytes
        twins.check()


def edit_once(window, chunk, entry):
    """A hook that replaces an entry of another layer when the first layer is written, and drops the chunk later."""

    def hook(write):
        if (write.branch, write.layer) == LAYERS[0] and chunk in window.chunks:
            window.replace(chunk, 3, *entry)
        if (write.branch, write.layer) == LAYERS[6] and chunk in window.chunks:
            window.drop(chunk)

    return hook, entry


@pytest.mark.parametrize("resident", range(7))
def test_only_finished_chunks_travel_to_the_device_and_only_the_clean_one_back(resident):
    twins = Twins(BUFFERS + resident * EACH, sink=1)
    rings, streamed = twins.bounded.rings, len(LAYERS) - resident
    for chunk in range(8):
        rings.loaded_bytes = rings.written_bytes = 0
        twins.append(chunk, forwards=5)
        old = min(chunk, LAYOUT.chunks - 1)
        loads = 5 * streamed if streamed > AHEAD + 1 else streamed
        assert rings.loaded_bytes <= loads * old * LAYOUT.entry_bytes
        assert rings.written_bytes == streamed * LAYOUT.entry_bytes
    assert rings.loaded_bytes >= (5 * (streamed - AHEAD - 1) + AHEAD + 1) * 3 * LAYOUT.entry_bytes
    twins.append(8, forwards=60)  # more than are planned at once
    tiers = [entry.tier for entry in twins.bounded.entries()]
    assert tiers.count("host") == streamed * LAYOUT.chunks
    assert {entry.tier for entry in twins.whole.entries()} == {"device"}


def test_a_dropped_window_frees_its_memory_and_a_freed_one_has_none():
    window = KVWindow(LAYOUT, WindowSink(), device_bytes=BUFFERS)
    memory = weakref.ref(window.rings._buffers[0])
    gc.disable()
    del window
    gc.enable()
    assert memory() is None
    window = KVWindow(LAYOUT, WindowSink(), device_bytes=BUFFERS)
    window.park()
    assert not window.freed
    for act in (window.free, window.park, window.unpark, window.free):
        act()
        assert (window.freed, window.device_bytes, window.entries()) == (True, 0, [])


def test_a_window_is_parked_between_two_chunks():
    window = KVWindow(LAYOUT, WindowSink())
    window.begin(7)
    with pytest.raises(RuntimeError, match="Chunk 7 is being computed; a window is parked between two chunks"):
        window.park()
    window.abandon()
    window.park()
    assert window.rings.parked
