"""A causal model on a CUDA device: the mode fast is close and compiled once, memory is flat, streams take turns."""

import pytest
import torch
from torch._dynamo.utils import counters

from edit_ray import EditCausalWanPipeline
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
