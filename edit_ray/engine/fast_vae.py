"""A VAE's decoder in `engine.mode: fast`: norm and activation as one kernel, padding left to the convolution.

The values are those of diffusers' modules up to the order of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

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
_WIDENED = "_edit_ray_wide"


@contextmanager
def fast_decoder(vae: AutoencoderKLWan, run: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """What the decoder computes in here is computed fast."""
    run = run or compiled_norm()
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
        elif isinstance(module, WanResidualBlock | WanDecoder3d) and isinstance(module.nonlinearity, nn.SiLU):
            norms = ("norm1", "norm2") if isinstance(module, WanResidualBlock) else ("norm_out",)
            for name in norms:
                norm: WanRMS_norm = getattr(module, name)
                replace(norm, partial(_normalised, run, norm))
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
def compiled_norm() -> Callable[..., Tensor]:
    """`norm_silu`, compiled once in a process for each number of channels."""
    return torch.compile(norm_silu, fullgraph=True)


def norm_silu(rows: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of `rows` [N, C], each normalised to the length √C, times `gamma` [C]; dense."""
    wide = rows.float()
    length = wide.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return F.silu(wide / length * rows.shape[1] ** 0.5 * gamma.float()).to(rows.dtype)


def causal_conv(conv: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """The convolution over what came before and `x` [B, C, T, H, W]; space is padded by the convolution itself."""
    width, _, height, _, before, _ = conv._padding
    if cache_x is not None and before > 0:
        x = torch.cat([cache_x, x], dim=2)
        before -= cache_x.shape[2]
    if before > 0:
        x = F.pad(x, (0, 0, 0, 0, before, 0))
    weight, bias = _widened(conv)
    return F.conv3d(x, weight, bias, conv.stride, (0, height, width))[:, : conv.out_channels]


def _widened(conv: WanCausalConv3d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with zeros for output channels up to what the matrix units take at a time, on a GPU.

    Convolutions to 96 channels otherwise run on kernels of an earlier generation, at half the speed.
    """
    weight, bias = conv.weight, conv.bias
    missing = -conv.out_channels % WIDE
    if not weight.is_cuda or conv.out_channels <= WIDE // 2 or not missing:
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


def _normalised(run: Callable[..., Tensor], norm: WanRMS_norm, x: Tensor) -> Tensor:
    last = x.permute(0, 2, 3, 4, 1)  # dense in the layout in which the convolutions leave it
    rows = last.reshape(-1, x.shape[1])
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return run(rows, norm.gamma.flatten()).view(last.shape).permute(0, 4, 1, 2, 3)


def _same(x: Tensor) -> Tensor:
    return x
