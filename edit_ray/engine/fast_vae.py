"""A VAE's decoder in `engine.mode: fast`: channels last, and one kernel between two convolutions.

The kernel adds the first one's bias, normalises, activates, and prepends the frames that a causal convolution looks
back at. Values are those of diffusers' modules up to the order of arithmetic.
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


def norm_silu(before: Tensor, rows: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
    """`before` [K, C], and after it SiLU of `rows` [N, C] plus `bias` [C], each normalised to √C, times `gamma` [C]."""
    wide = rows.float() + bias.float()
    length = wide.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    activated = F.silu(wide / length * rows.shape[1] ** 0.5 * gamma.float())
    return torch.cat([before, activated.to(rows.dtype)])


def add(rows: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """The sum of `rows` [N, C], `bias` [C] and `other` [N, C]."""
    return (rows.float() + bias.float() + other.float()).to(other.dtype)


class Kernels(NamedTuple):
    """The compiled functions, each for every number of channels and any number of pixels."""

    norm: Callable[..., Tensor] = norm_silu
    add: Callable[..., Tensor] = add


PLAIN = Kernels()


@cache
def compiled_kernels() -> Kernels:
    """Compiled once in a process."""
    return Kernels(*(torch.compile(function, fullgraph=True) for function in PLAIN))


@contextmanager
def fast_decoder(vae: AutoencoderKLWan, kernels: Kernels | None = None) -> Iterator[None]:
    """Inside, the VAE's decoder computes fast."""
    kernels = kernels or compiled_kernels()
    _lay_out(vae.decoder, {4: torch.channels_last, 5: torch.channels_last_3d})
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for module in vae.decoder.modules():
        if isinstance(module, WanCausalConv3d):
            forwards[module] = partial(causal_conv, module)
        elif isinstance(module, WanUpsample):
            forwards[module] = partial(upsample, module)
        elif isinstance(module, WanResidualBlock) and isinstance(module.nonlinearity, nn.SiLU):
            forwards[module] = partial(residual_block, kernels, module, module.forward)
        elif isinstance(module, WanDecoder3d) and isinstance(module.nonlinearity, nn.SiLU):
            forwards[module.norm_out] = partial(_norm_out, kernels, module.norm_out)
            forwards[module.nonlinearity] = nn.Identity()
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
            module.__dict__.pop(_WIDENED, None)
        _lay_out(vae.decoder, {4: torch.contiguous_format, 5: torch.contiguous_format})


def _lay_out(decoder: nn.Module, formats: dict[int, torch.memory_format]) -> None:
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.ndim])


def residual_block(
    kernels: Kernels,
    block: WanResidualBlock,
    diffusers: Callable[..., Tensor],
    x: Tensor,
    feat_cache: list[Any] | None = None,
    feat_idx: list[int] | None = None,
) -> Tensor:
    """The block on the stream's next `x` [1, C, T, H, W]; diffusers handles all but a stream of one video."""
    if feat_cache is None or feat_idx is None or len(x) != 1:
        return diffusers(x, feat_cache, feat_idx or [0])
    y, bias = x, torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
        y = _look_back(kernels, conv, norm, y, bias, feat_cache, feat_idx)
        bias = conv.bias.data
    return _shaped(kernels.add(_rows(y), bias, _rows(block.conv_shortcut(x))), y.shape)


def _look_back(
    kernels: Kernels,
    conv: WanCausalConv3d,
    norm: WanRMS_norm,
    x: Tensor,
    bias: Tensor,
    feat_cache: list[Any],
    feat_idx: list[int],
) -> Tensor:
    """The convolution, without its bias, of the normalised `x` plus `bias` and of the frames before."""
    before = feat_cache[feat_idx[0]]
    known = 0 if before is None else before.shape[2]
    rows, (_, channels, frames, height, width) = _rows(x), x.shape
    if known < LOOKBACK:
        zeros = rows.new_zeros(1, LOOKBACK - known, height, width, channels).permute(0, 4, 1, 2, 3)
        before = torch.cat([zeros, before], dim=2) if known else zeros
    joined = kernels.norm(_rows(before), rows, bias, norm.gamma.data.flatten().data)
    y = _shaped(joined, (1, channels, frames + LOOKBACK, height, width))
    feat_cache[feat_idx[0]] = y[:, :, -LOOKBACK:].clone()
    feat_idx[0] += 1
    return _convolved(conv, y, biased=False)


def _norm_out(kernels: Kernels, norm: WanRMS_norm, x: Tensor) -> Tensor:
    rows, zeros = _rows(x), torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    return _shaped(kernels.norm(rows.new_empty(0, x.shape[1]), rows, zeros, norm.gamma.data.flatten().data), x.shape)


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B·T·H·W, C], without a copy if the channels are last in memory.

    No view, so what is compiled for it depends on C alone, and not on how the tensor was made.
    """
    rows = x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1]).data  # `data` is not a view
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    torch._dynamo.mark_static(rows, 1)
    return rows


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    batch, channels, frames, height, width = shape
    return rows.view(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


def causal_conv(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The convolution over the frames before and `x` [B, C, T, H, W]; the convolution itself pads space."""
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
    """On a GPU, weight and bias padded with zeros to the number of output channels that its matrix units take at once.

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
