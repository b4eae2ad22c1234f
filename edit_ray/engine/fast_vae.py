"""A VAE's decoder in `engine.mode: fast`: channels last, and one kernel for what lies between two convolutions.

That are the bias of the first, norm, activation, and the frames before that a causal convolution looks back at. The
values are those of diffusers' modules up to the order of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResidualBlock,
    WanRMS_norm,
    WanUpsample,
)
from torch import Tensor, nn

WIDE = 128
LOOKBACK = 2  # frames before, of a convolution over three
_WIDENED = "_edit_ray_wide"


class Kernels(NamedTuple):
    """What is compiled, each for every number of channels and any number of pixels."""

    norm: Callable[..., Tensor]
    add: Callable[..., Tensor]


@contextmanager
def fast_decoder(vae: AutoencoderKLWan, kernels: Kernels | None = None) -> Iterator[None]:
    """What the decoder computes in here is computed fast."""
    kernels = kernels or compiled_kernels()
    _lay_out(vae.decoder, {4: torch.channels_last, 5: torch.channels_last_3d})
    replaced: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        replaced.append(module)

    for module in vae.decoder.modules():
        if isinstance(module, WanCausalConv3d):
            replace(module, partial(causal_conv, module))
        elif isinstance(module, WanUpsample):
            replace(module, partial(upsample, module))
        elif isinstance(module, WanResidualBlock) and isinstance(module.nonlinearity, nn.SiLU):
            replace(module, partial(residual_block, kernels, module, module.forward))
        elif isinstance(module, WanDecoder3d) and isinstance(module.nonlinearity, nn.SiLU):
            replace(module.norm_out, partial(_norm_out, kernels, module.norm_out))
            replace(module.nonlinearity, _same)
    try:
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)
            module.__dict__.pop(_WIDENED, None)
        _lay_out(vae.decoder, {4: torch.contiguous_format, 5: torch.contiguous_format})


def _lay_out(decoder: nn.Module, formats: dict[int, torch.memory_format]) -> None:
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.ndim])


@cache
def compiled_kernels() -> Kernels:
    """Compiled once in a process."""
    return Kernels(torch.compile(norm_silu, fullgraph=True), torch.compile(add, fullgraph=True))


def norm_silu(before: Tensor, rows: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
    """`before` [K, C], and after it SiLU of `rows` [N, C] plus `bias` [C], each normalised to √C, times `gamma` [C]."""
    wide = rows.float() + bias.float()
    length = wide.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    activated = F.silu(wide / length * rows.shape[1] ** 0.5 * gamma.float())
    return torch.cat([before, activated.to(rows.dtype)])


def add(rows: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """The sum of `rows` [N, C], `bias` [C] and `other` [N, C]."""
    return (rows.float() + bias.float() + other.float()).to(other.dtype)


PLAIN = Kernels(norm_silu, add)


def residual_block(
    kernels: Kernels,
    block: WanResidualBlock,
    diffusers: Callable[..., Tensor],
    x: Tensor,
    feat_cache: list[Any] | None = None,
    feat_idx: list[int] | None = None,
) -> Tensor:
    """The block on the stream's next `x` [1, C, T, H, W]; whatever is no stream of one video goes to diffusers'."""
    if feat_cache is None or feat_idx is None or len(x) != 1:
        return diffusers(x, feat_cache, feat_idx or [0])
    shortcut = block.conv_shortcut(x)
    nothing = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    y = _look_back(kernels, block.conv1, _rows(x), nothing, block.norm1, x.shape, feat_cache, feat_idx)
    y = _look_back(kernels, block.conv2, _rows(y), block.conv1.bias.data, block.norm2, y.shape, feat_cache, feat_idx)
    return _shaped(kernels.add(_rows(y), block.conv2.bias.data, _rows(shortcut)), y.shape)


def _look_back(
    kernels: Kernels,
    conv: WanCausalConv3d,
    rows: Tensor,
    bias: Tensor,
    norm: WanRMS_norm,
    shape: torch.Size,
    feat_cache: list[Any],
    feat_idx: list[int],
) -> Tensor:
    """The convolution, without its bias, of the normalised `rows` and what came before them."""
    index = feat_idx[0]
    before = feat_cache[index]
    if before is None or before.shape[2] < LOOKBACK:
        _, channels, _, height, width = shape
        known = 0 if before is None else before.shape[2]
        zeros = rows.new_zeros(1, LOOKBACK - known, height, width, channels).permute(0, 4, 1, 2, 3)
        before = zeros if before is None else torch.cat([zeros, before], dim=2)
    joined = kernels.norm(_rows(before), rows, bias, norm.gamma.data.flatten().data)
    y = _shaped(joined, torch.Size((*shape[:2], shape[2] + LOOKBACK, *shape[3:])))
    feat_cache[index] = y[:, :, -LOOKBACK:].clone()
    feat_idx[0] += 1
    return _convolved(conv, y, biased=False)


def _norm_out(kernels: Kernels, norm: WanRMS_norm, x: Tensor) -> Tensor:
    rows = _rows(x)
    nothing = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    return _shaped(
        kernels.norm(rows.new_empty(0, rows.shape[1]), rows, nothing, norm.gamma.data.flatten().data), x.shape
    )


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B·T·H·W, C], without a copy where the channels are last in memory.

    In a form that says nothing of how it was made: what is compiled for it depends on C, and not on the other sizes.
    """
    rows = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1]).data  # `data` is no view
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    torch._dynamo.mark_static(rows, 1)
    return rows


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    batch, channels, frames, height, width = shape
    return rows.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def causal_conv(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The convolution over what came before and `x` [B, C, T, H, W]; space is padded by the convolution itself."""
    before = conv._padding[4]
    if cache_x is not None and before > 0:
        x = torch.cat([cache_x, x], dim=2)
        before -= cache_x.shape[2]
    if before > 0:
        x = F.pad(x, (0, 0, 0, 0, before, 0))
    return _convolved(conv, x, biased=True)


def _convolved(conv: WanCausalConv3d, x: Tensor, *, biased: bool) -> Tensor:
    weight, bias = _widened(conv)
    padding = (0, conv._padding[2], conv._padding[0])
    return F.conv3d(x, weight, bias if biased else None, conv.stride, padding)[:, : conv.out_channels]


def _widened(conv: WanCausalConv3d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with zeros for output channels up to what the matrix units take at a time, on a GPU.

    Convolutions to 96 channels otherwise run on kernels of an earlier generation.
    """
    weight, bias = conv.weight, conv.bias
    missing = -conv.out_channels % WIDE
    if not weight.is_cuda or conv.out_channels <= WIDE // 2 or missing > WIDE // 4:
        return weight, bias
    made = conv.__dict__.get(_WIDENED)
    version = (weight.data_ptr(), weight._version)
    if made is None or made[0] != version:
        wide = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last_3d)
        made = conv.__dict__[_WIDENED] = (version, wide, None if bias is None else F.pad(bias, (0, missing)))
    return made[1], made[2]


def upsample(module: WanUpsample, x: Tensor) -> Tensor:
    """Nearest neighbours, which need no wider type."""
    return F.interpolate(x, scale_factor=module.scale_factor, mode=module.mode)


def _same(x: Tensor) -> Tensor:
    return x
