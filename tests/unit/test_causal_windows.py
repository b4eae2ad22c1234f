"""A stream whose window is larger than the device, or parked between chunks: the frames of one with all of it there."""

import pytest
import torch

from edit_ray import EditCausalWanPipeline
from edit_ray.cache import CPUOffloadStore
from edit_ray.cache.device_slots import AHEAD
from edit_ray.cache.kv_retention import Similar
from edit_ray.testing import save_random_wan
from tests.unit.test_causal_pipeline import CALL, latents_of, stream_of

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 6


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = save_random_wan(tmp_path_factory.mktemp("causal"), num_layers=LAYERS, causal={"window": 9, "sink": 3})
    pipe = EditCausalWanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bound(stream, resident):
    """The bytes with which so many layers stay on the device."""
    layout = stream.kv.layout
    each, least = layout.ring_bytes + layout.rotated_bytes, (AHEAD + 1) * layout.ring_bytes + layout.rotated_bytes
    return least + resident * each


def bounded_stream(pipe, resident, **changes):
    whole = stream_of(pipe, **changes)
    return stream_of(pipe, **changes, kv_device_bytes=bound(whole, resident))


def story(stream, *, parked=False):
    """Chunks past the window's end, with every kind of edit; the latents, and what was read between them."""
    made, kv = [], stream.kv

    def chunks(count):
        for _ in range(count):
            made.append(next(stream).latents)
            if parked:
                kv.park()
                assert kv.device_bytes == 0

    chunks(5)
    held = kv.chunks
    key, value = kv.get(held[-1], 1)
    kv.replace(held[-1], 1, value=value * 0.5)
    kv.replace(held[0], 4, key=key)
    remove = kv.on_write(lambda write: (write.key, write.value * 0.9) if write.layer in (2, 5) else None)
    chunks(1)
    remove()
    if len(kv.chunks) > 1:
        kv.drop(kv.chunks[0])
    chunks(2)
    stream.send(prompt=["a blue square"] * kv.layout.batch, switch="recache")
    chunks(2)
    entries = [kv.get(entry.chunk, entry.layer, entry.branch) for entry in kv.entries()]
    stream.send(prompt=["a red circle"] * kv.layout.batch, switch="cut")
    chunks(1)
    return made, entries


CASES = [
    {"window": 9, "sink": 3},
    {"window": 9, "sink": 0, "rope": "absolute"},
    {"window": 6, "sink": 0, "guidance_scale": 2.0},
    {"window": 12, "sink": 6, "rope": "absolute", "guidance_scale": 2.0},
    {"window": 3, "sink": 0},
    {"window": 12, "sink": 3, "num_videos_per_prompt": 2},
    {"window": 12, "sink": 3, "similar": True},
    {"window": 9, "sink": 0, "rope": "absolute", "similar": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_bound_and_parking_change_no_bit(pipe, case):
    case, similar = dict(case), case.get("similar", False)
    case.pop("similar", None)

    def changes():
        return case | ({"retention": Similar(retrieved=1), "store": CPUOffloadStore()} if similar else {})

    expected = story(stream_of(pipe, **changes()))
    for resident, parked in ((2, False), (0, True)):
        stream = bounded_stream(pipe, resident, **changes())
        made = story(stream, parked=parked)
        for one, other in zip(made, expected, strict=True):
            assert len(one) == len(other)
            assert all(map(torch.equal, one, other))


def test_the_device_holds_no_more_than_it_may(pipe):
    whole = stream_of(pipe)
    latents_of(whole, 4)
    for resident in (0, 2):
        stream = bounded_stream(pipe, resident)
        latents_of(stream, 4)
        assert next(stream).statistics.kv_bytes <= bound(stream, resident) < whole.kv.device_bytes
        tiers = {entry.layer: entry.tier for entry in pipe.kv.entries()}
        assert list(tiers.values()).count("device") == resident
        assert tiers[LAYERS - 1] == "host"


def test_in_a_call_and_beside_skipped_steps_and_offloaded_blocks_the_bits_are_the_same(pipe):
    size = {**CALL, "num_frames": 45, "output_type": "latent"}
    limit = bound(stream_of(pipe), 1)
    pipe.enable_cache("schedule", mask=[True, False, True, False])
    try:
        made = [
            pipe(**size, **more, generator=torch.Generator().manual_seed(0))[0]
            for more in ({}, {"kv_device_bytes": limit})
        ]
        assert torch.equal(*made)
        pipe.enable_block_offload("cpu", 2**30)
        again = pipe(**size, kv_device_bytes=limit, generator=torch.Generator().manual_seed(0))[0]
        assert torch.equal(again, made[0])
    finally:
        pipe.disable_block_offload()
        pipe.disable_cache()


def test_a_chunk_that_failed_and_streams_that_take_turns(pipe):
    expected, calls = latents_of(stream_of(pipe), 5), []

    def fails(pipe, step, t, tensors):
        calls.append(step)
        if len(calls) in (2, 19):
            raise RuntimeError("not now")
        return {}

    limit = bound(stream_of(pipe), 1)
    streams = [stream_of(pipe, kv_device_bytes=limit, callback_on_step_end=fails), stream_of(pipe)]
    made = [[], []]
    while len(made[1]) < 5:
        for stream, of in zip(streams, made, strict=True):
            try:
                of.append(next(stream).latents)
            except RuntimeError:
                of.append(next(stream).latents)
            stream.kv.park()
    for of in made:
        assert torch.equal(torch.cat(of, dim=2), expected)
    assert pipe.kv is streams[1].kv, "a parked window is there"


def test_too_few_bytes_are_said_before_anything_is_computed(pipe):
    least = bound(stream_of(pipe), 0)
    for given_bytes in (0, -5, least - 1, "8GB"):
        said = f"kv_device_bytes is {given_bytes!r}; it must be a whole number of bytes from {least}, for the layers"
        with pytest.raises(ValueError, match=said):
            stream_of(pipe, kv_device_bytes=given_bytes)
