"""A Wan block as one function of tensors, compiled once for all blocks of a transformer.

It computes what diffusers' `WanTransformerBlock` computes, in another order of arithmetic: one product for query, key
and value, RoPE in real numbers without rounding between it and the norm before, keys and values of the text computed
before. It sees no module, so neither a cache on the blocks nor another block compiles it again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Layer(NamedTuple):
    """A linear layer [out, in]; with `scale` [1, out] its weight is in FP8."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


class BlockWeights(NamedTuple):
    """The weights of one block."""

    table: Tensor  # [1, 6, D] float32
    qkv: Layer
    norm_q: Tensor  # [D]
    norm_k: Tensor
    out: Layer
    norm2: tuple[Tensor, Tensor] | None  # [D] each
    text_q: Layer
    text_norm_q: Tensor
    text_out: Layer
    up: Layer
    down: Layer


class TextKeys(NamedTuple):
    """Keys and values [B, heads, L, head_dim] of a projected text, and of CLIP's features where there are any."""

    k: Tensor
    v: Tensor
    image_k: Tensor | None = None
    image_v: Tensor | None = None


class Sizes(NamedTuple):
    """The block's constants."""

    heads: int
    eps: float
    qk_eps: float


class Rope(NamedTuple):
    """Cosines and sines [N, head_dim] in float32; the sine of each pair's first has the opposite sign."""

    cos: Tensor
    sin: Tensor


def block(x: Tensor, text: TextKeys, temb: Tensor, rope: Rope, w: BlockWeights, sizes: Sizes) -> Tensor:
    """The block's output [B, N, D] for `x` [B, N, D]; `temb` is [B, 6, D] or [B, N, 6, D]."""
    q, k, v = _query_key_value(x, temb, w, sizes)
    q, k = rotate(q, rope, x.dtype), rotate(k, rope, x.dtype)
    return leave(x, F.scaled_dot_product_attention(q, k, v.transpose(1, 2)), text, temb, w, sizes)


def enter(x: Tensor, temb: Tensor, rope: Rope, w: BlockWeights, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of a block before its attention: query, key, rotated key and value [B, N, heads, head_dim]."""
    q, k, v = _query_key_value(x, temb, w, sizes)
    turned = [rotate(part, rope, x.dtype).transpose(1, 2) for part in (q, k)]
    return turned[0], k.to(x.dtype), turned[1], v


def leave(x: Tensor, attended: Tensor, text: TextKeys, temb: Tensor, w: BlockWeights, sizes: Sizes) -> Tensor:
    """A block after its self-attention, from `attended` [B, heads, N, head_dim] to its output [B, N, D]."""
    dtype = x.dtype
    _, _, gate, ff_shift, ff_scale, ff_gate = _modulation(temb, w)
    x = (x.float() + linear(attended.transpose(1, 2).flatten(2), w.out).float() * gate).to(dtype)

    h = x
    if w.norm2 is not None:
        h = (_normalised(x, sizes.eps) * w.norm2[0].float() + w.norm2[1].float()).to(dtype)
    q = _rms(linear(h, w.text_q), w.text_norm_q, sizes).to(dtype).transpose(1, 2)
    attended = F.scaled_dot_product_attention(q, text.k, text.v)
    if text.image_k is not None and text.image_v is not None:
        attended = attended + F.scaled_dot_product_attention(q, text.image_k, text.image_v)
    x = x + linear(attended.transpose(1, 2).flatten(2), w.text_out)

    h = (_normalised(x, sizes.eps) * (1 + ff_scale) + ff_shift).to(dtype)
    h = feed_forward(h, w.up, w.down)
    out: Tensor = (x.float() + h.float() * ff_gate).to(dtype)
    return out


def _query_key_value(x: Tensor, temb: Tensor, w: BlockWeights, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, heads, head_dim] each; query and key normalised, in float32."""
    shift, scale, *_ = _modulation(temb, w)
    h = (_normalised(x, sizes.eps) * (1 + scale) + shift).to(x.dtype)
    q, k, v = linear(h, w.qkv).chunk(3, dim=-1)
    return _rms(q, w.norm_q, sizes), _rms(k, w.norm_k, sizes), _heads(v, sizes.heads)


def _modulation(temb: Tensor, w: BlockWeights) -> list[Tensor]:
    """The six parts [B, 1 or N, D] of a block's modulation."""
    modulation = (w.table if temb.ndim == 3 else w.table[None]) + temb.float()
    return [part if temb.ndim == 4 else part[:, None] for part in modulation.unbind(-2)]


def embed(latents: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Latents [B, C, T, h, w] cut into patches and embedded by `weight` [D, C, pt, ph, pw], as [B, N, D]."""
    patch = weight.shape[2:]
    cut = latents.unflatten(4, (-1, patch[2])).unflatten(3, (-1, patch[1])).unflatten(2, (-1, patch[0]))
    rows = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    return F.linear(rows, weight.flatten(1), bias)


def head(x: Tensor, temb: Tensor, table: Tensor, layer: Layer, grid: tuple[int, ...], eps: float) -> Tensor:
    """The last block's output [B, N, D] as latents [B, C, T, h, w].

    `temb` is [B, D] or [B, N, D], `table` [1, 2, D]; `grid` has the patches along T, h, w, and the sizes of one.
    """
    modulation = (table if temb.ndim == 2 else table[None]) + temb.unsqueeze(-2)
    shift, scale = (part if temb.ndim == 3 else part[:, None] for part in modulation.unbind(-2))
    h = (_normalised(x, eps) * (1 + scale) + shift).to(x.dtype)
    cut = F.linear(h, layer.weight, layer.bias).unflatten(1, grid[:3]).unflatten(-1, (*grid[3:], -1))
    joined: Tensor = cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return joined


def rotate(x: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """`x` [B, N, heads, head_dim] turned pair by pair, as [B, heads, N, head_dim]."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned: Tensor = (x * rope.cos[:, None] + swapped * rope.sin[:, None]).to(dtype)
    return turned.transpose(1, 2)


def feed_forward(x: Tensor, up: Layer, down: Layer) -> Tensor:
    """Up, GELU in its tanh form, and down again; [B, N, D]."""
    if up.scale is None:
        return F.linear(linear_gelu(x, up.weight, up.bias), down.weight, down.bias)
    h = linear(x, up)
    # GELU grows above -0.75 and is never below -0.17: the largest input bounds its results.
    largest = _gelu(h.amax(-1, keepdim=True).float()).clamp_min(0.171)
    return _eight_bits(_gelu(h.float()), largest, down, x.dtype)


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, written with a sigmoid, which takes half the instructions."""
    return x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))


@torch.library.custom_op("edit_ray::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer and GELU in its tanh form, on a GPU in one kernel; compiled they would be two."""
    if not x.is_cuda or bias is None:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    rows: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], len(weight))


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def linear(x: Tensor, layer: Layer) -> Tensor:
    """`x` [B, N, in] through the layer; in FP8 with one scale for each row of `x` and each row of the weight."""
    if layer.scale is None:
        return F.linear(x, layer.weight, layer.bias)
    return _eight_bits(x, x.abs().amax(-1, keepdim=True).float(), layer, x.dtype)


def _eight_bits(x: Tensor, largest: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    scale = largest.clamp_min(1e-12) / FP8_MAX
    rows = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).flatten(0, 1)
    assert layer.scale is not None
    product: Tensor = torch._scaled_mm(
        rows, layer.weight.t(), scale.flatten(0, 1), layer.scale, bias=layer.bias, out_dtype=dtype, use_fast_accum=True
    )
    return product.view(*x.shape[:-1], product.shape[-1])


def quantise(layer: Layer) -> Layer:
    """The layer with its weight in FP8, scaled by row."""
    scale = layer.weight.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / FP8_MAX
    return Layer((layer.weight.float() / scale).to(FP8), layer.bias, scale.t().contiguous())


def _heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split


def _normalised(x: Tensor, eps: float) -> Tensor:
    """With mean 0 and variance 1 over the last dimension, in float32; both from one pass over it."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide.square().mean(-1, keepdim=True) - mean.square()).clamp_min(0)
    return (wide - mean) * torch.rsqrt(variance + eps)


def _rms(x: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
    """Normalised over all heads together, float32 [B, N, heads, head_dim]."""
    x = x.float()
    normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + sizes.qk_eps) * weight.float()
    return _heads(normalised, sizes.heads)
