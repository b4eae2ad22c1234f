"""The pieces of a forward: its matrix products and attention alone, one block, and what bounds the whole."""

import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.forward_bench import Bench, Model, Row, deviation, kernels
from edit_ray.engine import fast_block
from edit_ray.engine.fast_transformer import FastTransformer, Functions, compiled


def products(bench: Bench, model: Model) -> None:
    """The block's matrix products and attention, each alone."""
    device, dtype, config = bench.device, model.dtype, model.transformer.config
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    width, ffn = heads * head_dim, config.ffn_dim
    _, _, frames, height, columns = model.latents.shape
    tokens = frames * height * columns // 4
    rows = torch.randn(tokens, width, device=device).to(dtype)
    wide = torch.randn(tokens, ffn, device=device).to(dtype)

    def weights(out: int, into: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(out, into, device=device) / into**0.5).to(dtype), torch.zeros(out, device=device).to(dtype)

    shapes = {"d_d": (rows, width, width), "d_3d": (rows, 3 * width, width)}
    shapes |= {"d_f": (rows, ffn, width), "f_d": (wide, width, ffn)}

    def of_products() -> Row:
        found: Row = {}
        for name, (x, out, into) in shapes.items():
            weight, bias = weights(out, into)
            found[name] = bench.device_ms(partial(F.linear, x, weight, bias))
            if device.type == "cuda":
                found |= _eight_bits(bench, name, x, weight)
        weight, bias = weights(ffn, width)
        found["gelu"] = bench.device_ms(partial(F.gelu, wide, approximate="tanh"))
        found["d_f with gelu"] = bench.device_ms(lambda: torch._addmm_activation(bias, rows, weight.t(), use_gelu=True))
        return found

    bench.part("products", of_products)

    def of_attention() -> Row:
        found = {}
        fused = torch.randn(1, tokens, 3 * width, device=device).to(dtype)
        views = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in fused.chunk(3, dim=-1)]
        layouts = {"views": views, "contiguous": [part.contiguous() for part in views]}
        layouts["tokens_first"] = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in views]
        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        for backend, which in backends.items() if device.type == "cuda" else ():
            for layout, qkv in layouts.items():
                with sdpa_kernel(which):
                    found[f"{backend}, {layout}"] = bench.device_ms(partial(F.scaled_dot_product_attention, *qkv), 5)
            for name, keys in {"text": 512, "keys to a multiple of 128": -(-tokens // 128) * 128}.items():
                key, value = (torch.randn(1, heads, keys, head_dim, device=device).to(dtype) for _ in range(2))
                with sdpa_kernel(which):
                    attend = partial(F.scaled_dot_product_attention, views[0], key, value)
                    found[f"{backend}, {name}"] = bench.device_ms(attend, 10)
        found["default, views"] = bench.device_ms(partial(F.scaled_dot_product_attention, *views), 5)
        return found

    bench.part("attention", of_attention)


def _eight_bits(bench: Bench, name: str, x: Tensor, weight: Tensor) -> Row:
    layer = fast_block.quantise(fast_block.Layer(weight, None))
    assert layer.scale is not None
    x8, one = x.to(fast_block.FP8), torch.ones((), device=x.device)
    ones = torch.ones(len(x), 1, device=x.device)
    scaled = partial(torch._scaled_mm, x8, layer.weight.t(), out_dtype=x.dtype, use_fast_accum=True)
    return {
        f"{name} fp8 by row": bench.device_ms(partial(scaled, scale_a=ones, scale_b=layer.scale)),
        f"{name} fp8 by tensor": bench.device_ms(partial(scaled, scale_a=one, scale_b=one)),
    }


def blocks(bench: Bench, model: Model) -> None:
    """One block, in several ways."""
    block = model.transformer.blocks[0]
    seen: dict[str, Any] = {}

    def watch(_module: Any, args: tuple[Any, ...]) -> None:
        seen["args"] = args

    handle = block.register_forward_pre_hook(watch)
    model.forward()
    handle.remove()
    args = seen["args"]
    wanted = block(*args)
    bench.part("block, diffusers eager", lambda: {"ms": bench.device_ms(lambda: block(*args), 5)})

    def ours(functions: Functions, fp8: bool = False) -> Row:
        fast = FastTransformer(model.transformer, fp8=fp8, functions=functions)
        with fast.installed():
            got = block(*args)
            found: Row = {"ms": bench.device_ms(lambda: block(*args), 10), "deviation": deviation(got, wanted)}
            if bench.device.type == "cuda":
                found["kernels"] = kernels(lambda: block(*args), 25)
        return found

    bench.part("block, ours eager", lambda: ours(Functions()))
    if bench.device.type == "cuda" or not bench.quick:
        bench.part("block, ours compiled", lambda: ours(compiled()), 20)
        bench.part("block, ours compiled, fp8", lambda: ours(compiled(), fp8=True), 20)


def limits(bench: Bench, model: Model) -> None:
    """What bounds a forward in the mode `fast`: its time as a CUDA graph, and the GPU's clock and power meanwhile."""
    if bench.device.type != "cuda":
        return

    def measured() -> Row:
        fast = FastTransformer(model.transformer)
        with model.known(), fast.installed():
            found: Row = {"ms": bench.device_ms(model.forward)}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model.forward()
            found["as_graph_ms"] = bench.device_ms(graph.replay)
            return found | _under_load(graph.replay)

    bench.part("forward, fast, limits", measured, 15)


def _under_load(work: Callable[[], Any], seconds: float = 3.0) -> Row:
    """What the GPU says of itself after so long of the same work."""
    asked = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "clocks_throttle_reasons.sw_power_cap")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        work()
        torch.cuda.synchronize()
    work()
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(asked)}",
        "--format=csv,noheader",
        f"--id={torch.cuda.current_device()}",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    torch.cuda.synchronize()
    return dict(zip(asked, (value.strip() for value in said.split(",")), strict=True))
