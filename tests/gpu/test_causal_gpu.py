"""A causal model on a CUDA device: the mode fast is close and compiled once, memory is flat, streams take turns.

Windows larger than their share of the device, and parked ones, give the bits of resident ones.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from edit_ray import EditCausalWanPipeline
from edit_ray.cache import CPUOffloadStore
from edit_ray.cache.kv_retention import Similar
from edit_ray.testing import Variant, make_model

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 96, "num_layers": 3, "text_dim": 32}
VAE = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
SMALL = Variant(
    SIZES | {"freq_dim": 32, "rope_max_seq_len": 128, "in_channels": 4, "out_channels": 4},
    flow_shift=5.0,
    vae=VAE | {"dim_mult": [1, 2, 2, 2]},
    text_encoder={"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2},
    causal={"window": 12, "sink": 3},
)


@pytest.fixture
def pipe(tmp_path):
    make_model(tmp_path, SMALL, dtype=torch.float32)
    return EditCausalWanPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device="cuda")


def stream_of(pipe, **changes):
    call = {"prompt": "a red circle", "height": 64, "width": 96, "decode": False, **changes}
    return pipe.stream(**call, generator=torch.Generator().manual_seed(0))


def latents_of(stream, count):
    return torch.cat([next(stream).latents for _ in range(count)], dim=2)


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_fast_is_close_repeatable_and_compiled_once(pipe, rope):
    exact = latents_of(stream_of(pipe, rope=rope), 8)
    pipe.use_mode("fast")
    fast = latents_of(stream_of(pipe, rope=rope), 8)
    compiled = counters["stats"]["unique_graphs"]
    assert torch.equal(latents_of(stream_of(pipe, rope=rope), 8), fast)
    assert counters["stats"]["unique_graphs"] == compiled
    assert (fast - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_memory_is_flat_and_streams_take_turns(pipe, mode):
    pipe.use_mode(mode)
    expected = latents_of(stream_of(pipe), 6)
    one, other = stream_of(pipe), stream_of(pipe, prompt="a blue square")
    assert torch.equal(torch.cat([(next(one), next(other))[0].latents for _ in range(6)], dim=2), expected)
    memory = []
    for _ in range(12):
        next(one)
        memory.append(torch.cuda.memory_allocated())
    assert max(memory[2:]) == min(memory[2:])
    one.close()
    assert torch.cuda.memory_allocated() < memory[-1]


@pytest.fixture
def deep(tmp_path):
    """Ten layers, and tokens enough that copies take a while."""
    variant = replace(SMALL, transformer={**SMALL.transformer, "num_layers": 10})
    make_model(tmp_path, variant, dtype=torch.float32)
    return EditCausalWanPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device="cuda")


def large_stream(pipe, **changes):
    return stream_of(pipe, height=256, width=384, **changes)


def bound(pipe, resident, **changes):
    """The bytes with which so many layers stay on the device, and those of the whole window."""
    stream = large_stream(pipe, **changes)
    layout, whole = stream.kv.layout, stream.kv.device_bytes
    each = layout.ring_bytes + layout.rotated_bytes
    stream.close()
    return 3 * layout.ring_bytes + layout.rotated_bytes + resident * each, whole


def edited(stream):
    """Latents of a stream whose K/V is edited, made again and dropped, and the last chunk's K/V."""
    made = [next(stream).latents for _ in range(5)]
    key, value = stream.kv.get(stream.kv.chunks[-1], 3)
    stream.kv.replace(stream.kv.chunks[-1], 3, key=key, value=value * 0.5)
    made.append(next(stream).latents)
    stream.kv.drop(stream.kv.chunks[1])
    made += [next(stream).latents for _ in range(2)]
    stream.send(prompt=["a blue square"] * stream.kv.layout.batch, switch="recache")
    made += [next(stream).latents for _ in range(2)]
    return torch.cat(made, dim=2), [stream.kv.get(stream.kv.chunks[-1], layer) for layer in range(10)]


@pytest.mark.parametrize(
    ("mode", "resident", "changes"),
    [
        ("exact", 0, {"rope": "relative"}),
        ("exact", 3, {"rope": "relative"}),
        ("exact", 3, {"rope": "absolute"}),
        ("exact", 3, {"rope": "relative", "guidance_scale": 2.0}),
        ("exact", 0, {"rope": "absolute", "prompt": ["a red circle", "a white square"]}),
        ("fast", 3, {"rope": "relative"}),
        ("fast", 0, {"rope": "absolute"}),
    ],
)
def test_a_window_larger_than_its_share_has_the_same_bits(deep, mode, resident, changes):
    deep.use_mode(mode)
    limit, whole = bound(deep, resident, **changes)
    latents, entries = edited(large_stream(deep, **changes))
    for _ in range(3):  # a copy too early or too late would not be so each time
        stream = large_stream(deep, **changes, kv_device_bytes=limit)
        assert stream.kv.device_bytes <= limit < whole
        made, kept = edited(stream)
        assert torch.equal(made, latents)
        assert all(map(torch.equal, kept, entries))
        assert {entry.tier for entry in stream.kv.entries()} == ({"device", "host"} if resident else {"host"})
        stream.close()


def test_old_chunks_are_chosen_as_from_a_resident_window(deep):
    limit, _ = bound(deep, 2)

    def made(**more):
        stream = large_stream(deep, retention=Similar(retrieved=1), store=CPUOffloadStore(), **more)
        return latents_of(stream, 9), stream.kv.chunks

    latents, chunks = made()
    bounded = made(kv_device_bytes=limit)
    assert torch.equal(bounded[0], latents)
    assert bounded[1] == chunks


def test_the_cap_holds(deep):
    limit, whole = bound(deep, 2)
    # Encoded before: 512 tokens take 14 MB for their relative positions, more than a chunk with all of its window.
    text = {"prompt": None, "prompt_embeds": deep.encode_text("a red circle", None, 512)}
    first = large_stream(deep, **text)
    latents_of(first, 5)  # what is made once is there
    first.close()
    peaks = []
    for more in ({}, {"kv_device_bytes": limit}):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stream = large_stream(deep, **text, **more)
        assert torch.cuda.memory_allocated() - before <= more.get("kv_device_bytes", whole) + 2**20  # and the text
        latents_of(stream, 6)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        stream.close()
    assert peaks[0] > whole
    assert peaks[0] - peaks[1] >= 0.9 * (whole - limit)
    assert all(memory.bytes.is_pinned() for memory in large_stream(deep, kv_device_bytes=limit).kv.rings._memory)


@pytest.mark.parametrize("resident", [None, 2])
def test_parked_windows_take_turns_and_free_the_device(deep, resident):
    more = {} if resident is None else {"kv_device_bytes": bound(deep, resident)[0]}
    expected = [latents_of(large_stream(deep, prompt=prompt), 6) for prompt in ("a red circle", "a blue square")]
    torch.cuda.synchronize()
    streams, made = [], [[], []]
    for prompt in ("a red circle", "a blue square"):
        streams.append(large_stream(deep, prompt=prompt, **more))
        streams[-1].kv.park()
    for _ in range(6):
        for stream, of in zip(streams, made, strict=True):
            of.append(next(stream).latents)
            taken, size = torch.cuda.memory_allocated(), stream.kv.device_bytes
            stream.kv.park()
            assert taken - torch.cuda.memory_allocated() >= size > 0
            assert stream.kv.device_bytes == 0
            streams[0].kv.unpark()  # moves while the other computes
    for of, latents in zip(made, expected, strict=True):
        assert torch.equal(torch.cat(of, dim=2), latents)
