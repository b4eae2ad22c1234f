"""The window of K/V against a plain dict: what is in it, where it is, and what may be put there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache import CPUOffloadStore, GPUStore, RetentionPolicy, TieredStore
from edit_ray.cache.kv import KVWindow
from edit_ray.cache.kv_retention import Similar, WindowSink, WindowState, make_retention
from edit_ray.cache.kv_rings import KVLayout

LAYOUT = KVLayout(
    num_layers=2, batch=1, tokens=3, heads=2, head_dim=4, chunks=4, dtype=torch.float32, device=torch.device("cpu")
)
BRANCHES = ("cond", "uncond")


def kv_of(chunk, layer, branch="cond"):
    """The K/V [2, B, tokens, heads, head_dim] that tests write for a chunk."""
    return torch.full(LAYOUT.entry_shape, 100.0 * chunk + 10 * layer + BRANCHES.index(branch)) + torch.arange(4.0)


def append(window, chunk):
    window.begin(chunk, forwards=2)
    for window.finished, sign in ((False, -1), (True, 1)):  # a step, and the clean chunk
        for branch in BRANCHES:
            for layer in range(LAYOUT.num_layers):
                window.write(branch, layer, *kv_of(chunk, layer, branch) * sign)
    window.complete()


def check(window, expected):
    """The window holds exactly these chunks, in the first slots, with what was written."""
    assert window.chunks == tuple(sorted(expected))
    assert sorted(window.order) == sorted(expected)
    for branch in BRANCHES:
        for layer in range(LAYOUT.num_layers):
            keys, values = window.window(branch, layer)
            assert keys.shape[1] == len(expected)
            for slot, chunk in enumerate(window.order):
                key, value = kv_of(chunk, layer, branch)
                assert torch.equal(keys[:, slot], key)
                assert torch.equal(values[:, slot], value)
                assert torch.equal(window.get(chunk, layer, branch), kv_of(chunk, layer, branch))


def made(retention=None, **options):
    return KVWindow(LAYOUT, retention or WindowSink(), branches=BRANCHES, name="stream", **options)


@settings(max_examples=60)
@given(sink=st.integers(0, 3), acts=st.lists(st.sampled_from(["append", "append", "append", "fail", "drop", "clear"])))
def test_the_window_is_a_plain_list_of_chunks(sink, acts):
    window, expected, places = made(sink_chunks=sink), [], LAYOUT.chunks - 1
    for chunk, act in enumerate(acts):
        if act in ("append", "fail"):
            expected = expected[:sink] + expected[sink:][max(len(expected) - places, 0) :]
        if act == "append":
            append(window, chunk)
            expected.append(chunk)
        elif act == "fail":
            window.begin(chunk)
            window.write("cond", 0, *kv_of(chunk, 0))
            window.abandon()
        elif act == "drop" and expected:
            window.drop(expected.pop(chunk % len(expected)))
        elif act == "clear":
            window.clear()
            expected = []
        check(window, expected)


@pytest.mark.parametrize("make_store", [GPUStore, lambda: TieredStore([(CPUOffloadStore(), 2**20)])])
def test_old_chunks_come_back_from_a_store_if_they_are_like_the_latest(make_store):
    window = made(Similar(retrieved=1, stored_chunks=3), sink_chunks=1, store=make_store())
    for chunk in range(6):
        append(window, chunk)
    assert (window.chunks, window.stored) == ((0, 3, 4, 5), (1, 2))
    window._summaries |= {5: torch.tensor([1.0, 0.0]), 1: torch.tensor([2.0, 0.1]), 2: torch.tensor([0.0, 3.0])}
    window._summaries |= {3: torch.tensor([0.0, 1.0]), 4: torch.tensor([0.0, 1.0])}
    append(window, 6)
    check(window, [0, 1, 5, 6])
    assert window.stored == (2, 3, 4)
    assert torch.equal(window.get(3, 1), kv_of(3, 1))
    tiers = {entry.chunk: entry.tier for entry in window.entries()}
    assert tiers[0] == "device"
    assert tiers[3] in ("host", "device")
    assert sum(entry.bytes for entry in window.entries()) == 7 * 2 * 2 * LAYOUT.entry_bytes
    window.drop(2)
    window.clear()
    assert window.entries() == []
    assert len(window.store) == 0


def test_in_the_steady_state_the_new_chunk_takes_the_slot_of_the_one_that_left():
    window, order = made(sink_chunks=1), []
    for chunk in range(8):
        append(window, chunk)
        order.append(window.order)
    assert order[3:] == [(0, 1, 2, 3), (0, 4, 2, 3), (0, 4, 5, 3), (0, 4, 5, 6), (0, 7, 5, 6)]


def test_what_the_store_has_lost_is_not_attended_to():
    window = made(Similar(retrieved=1, stored_chunks=9), sink_chunks=1, store=GPUStore())
    for chunk in range(5):
        append(window, chunk)
    window.store.drop(("stream", "kv", "cond", 1, 1))
    assert window.get(1, 1) is None
    window._summaries[1] = window._summaries[4]
    append(window, 5)
    check(window, [0, 4, 5])
    assert window.stored == (2, 3)


def test_hooks_and_edits_change_what_is_kept():
    window, seen = made(), []

    def hook(write):
        seen.append((write.branch, write.layer, write.chunk))
        return (write.key * 2, write.value) if write.layer else None

    remove = window.on_write(hook)
    append(window, 0)
    remove()
    assert seen == [(branch, layer, 0) for branch in BRANCHES for layer in range(2)]
    assert torch.equal(window.get(0, 1), kv_of(0, 1) * torch.tensor([2.0, 1.0]).view(2, 1, 1, 1, 1))
    assert torch.equal(window.get(0, 0), kv_of(0, 0))
    version = window.version
    window.replace(0, 1, value=kv_of(7, 1)[1])
    assert torch.equal(window.get(0, 1)[1], kv_of(7, 1)[1])
    assert window.version > version


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(1, 3, 2, 5), r"The value is a tensor \[1, 3, 2, 5\] of torch.float32 on cpu; it must be a tensor"),
        (
            torch.zeros(1, 3, 2, 4).half(),
            r"of torch.float16 on cpu; it must be a tensor \[1, 3, 2, 4\] of torch.float32",
        ),
        (3, "The value is int; it must be a tensor"),
    ],
)
def test_kv_of_another_shape_or_type_is_refused(value, said):
    window = made()
    append(window, 0)
    with pytest.raises((ValueError, TypeError), match=said):
        window.replace(0, 0, value=value)
    check(window, [0])


def test_what_is_not_there_is_said():
    window = made()
    append(window, 0)
    with pytest.raises(LookupError, match=r"no chunk 4; there are \[0\]"):
        window.drop(4)
    with pytest.raises(LookupError, match=r"no chunk 4 in the window; there are \[0\]"):
        window.replace(4, 0)
    with pytest.raises(LookupError, match="no layer 2 of the branch 'cond'; there are layers 0 to 1 of cond, uncond"):
        window.get(0, 2)


def test_a_policy_that_chooses_too_much_is_said():
    class All(RetentionPolicy):
        def select(self, window):
            return (*window.held, window.chunk)

    with pytest.raises(ValueError, match=r"All chose the chunks \[0\]; it must choose at most 3 of \[\]"):
        made(All()).begin(0)
    with pytest.raises(TypeError, match="it must be one of similar, window_sink, or a RetentionPolicy"):
        make_retention(3)
    with pytest.raises(ValueError, match="no retention policy named 'best'; there are similar, window_sink"):
        make_retention("best")


@given(
    held=st.sets(st.integers(0, 20), max_size=12), stored=st.sets(st.integers(0, 20), max_size=12),
    places=st.integers(0, 8), sink=st.integers(0, 8), retrieved=st.integers(0, 4),
)  # fmt: skip
def test_similar_fills_the_places(held, stored, places, sink, retrieved):
    stored, sink = stored - held, min(sink, places)
    known = sorted(held | stored)
    summaries = {chunk: torch.tensor([float(chunk % 3) + 1, 1.0]) for chunk in known}
    state = WindowState(21, tuple(sorted(held)), tuple(sorted(stored)), places, sink, summaries)
    chosen = Similar(retrieved).select(state)
    assert len(set(chosen)) == len(chosen) == min(len(known), places)
    assert set(known[:sink]) <= set(chosen) <= set(known)
