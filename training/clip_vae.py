"""Wan 2.2's causal video autoencoder over whole clips at once.

`AutoencoderKLWan.encode` and `.decode` walk a clip in chunks and carry a cache of features; training through that loop
is slow. All its convolutions are causal in time and start from zeros, so one pass over the whole clip computes the
same numbers. The first frame is treated apart in both temporal resamplings: it passes `time_conv` by, and their
shortcuts pad it to a pair of frames.

Activations are [B, T, H, W, C], so that a convolution over time is a 2-D one over three stacked frames. At these few
channels that is several times faster than Conv3d on a CPU, and nearly as fast on a GPU.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn


def encode_clip(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """Encode clips [B, 3, 4k+1, H, W] into the mode of the latents' distribution, [B, C, k+1, H/8, W/8].

    Equals `vae.encode(clip).latent_dist.mode()`; latents are not normalised.
    """
    x = _causal_conv(vae.encoder.conv_in, patchify(clip, vae.config.patch_size).permute(0, 2, 3, 4, 1))
    for block in vae.encoder.down_blocks:
        x = _down_block(block, x)
    x = _middle(vae.encoder.mid_block, x)
    x = _causal_conv(vae.encoder.conv_out, _norm_silu(x, vae.encoder.norm_out.gamma))
    return _causal_conv(vae.quant_conv, x).permute(0, 4, 1, 2, 3).chunk(2, dim=1)[0]


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode latents [B, C, k+1, H/8, W/8] into clips [B, 3, 4k+1, H, W]: `vae.decode(latents).sample`, not clamped."""
    x = _causal_conv(vae.post_quant_conv, latents.permute(0, 2, 3, 4, 1))
    x = _middle(vae.decoder.mid_block, _causal_conv(vae.decoder.conv_in, x))
    for block in vae.decoder.up_blocks:
        x = _up_block(block, x)
    x = _causal_conv(vae.decoder.conv_out, _norm_silu(x, vae.decoder.norm_out.gamma))
    clip: Tensor = unpatchify(x.permute(0, 4, 1, 2, 3), vae.config.patch_size)
    return clip


def _norm_silu_eager(x: Tensor, gamma: Tensor) -> Tensor:
    """Wan's RMS norm over the channels of [N, C], then SiLU."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return F.silu(F.normalize(wide, dim=-1) * (x.shape[-1] ** 0.5) * gamma).to(x.dtype)


@cache
def _norm_silu_compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_norm_silu_eager)  # on first use: even asking for it loads the compiler


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not x.is_cuda:
        return _norm_silu_eager(rows, gamma.flatten()).view(x.shape)
    torch._dynamo.mark_dynamic(rows, 0)  # one kernel for every clip length
    normed: Tensor = _norm_silu_compiled()(rows, gamma.flatten())
    return normed.view(x.shape)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """A 2-D convolution of every frame of [B, T, H, W, C]."""
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels-last strides, no copy
    convolved = F.conv2d(frames, weight, bias, padding=padding).permute(0, 2, 3, 1)
    return convolved.reshape(*x.shape[:2], *convolved.shape[1:])


def _causal_conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    if conv.kernel_size[0] == 1:
        return _conv2d(x, conv.weight[:, :, 0], conv.bias, conv.kernel_size[1] // 2)
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    return _time_conv(conv, [padded[:, i : i + x.shape[1]] for i in range(3)])


def _time_conv(conv: nn.Conv3d, frames: list[Tensor]) -> Tensor:
    """Convolve in time: `frames` holds the input of each of the kernel's three taps, [B, T, H, W, C]."""
    weight = conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
    return _conv2d(torch.cat(frames, dim=-1), weight, conv.bias, conv.kernel_size[1] // 2)


def _residual(block: WanResidualBlock, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _causal_conv(block.conv_shortcut, x)
    hidden = _causal_conv(block.conv1, _norm_silu(x, block.norm1.gamma))
    return _causal_conv(block.conv2, _norm_silu(hidden, block.norm2.gamma)) + shortcut


def _middle(block: WanMidBlock, x: Tensor) -> Tensor:
    x = _residual(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # its attention is within each frame already
        x = attention(frames[:, :, None])[:, :, 0].permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        x = _residual(resnet, x)
    return x


def _down_block(block: WanResidualDownBlock, x: Tensor) -> Tensor:
    shortcut: Tensor = block.avg_shortcut(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    for resnet in block.resnets:
        x = _residual(resnet, x)
    return shortcut + (x if block.downsampler is None else _downsample(block.downsampler, x))


def _up_block(block: WanResidualUpBlock, x: Tensor) -> Tensor:
    before = x.permute(0, 4, 1, 2, 3)
    for resnet in block.resnets:
        x = _residual(resnet, x)
    if block.upsampler is None:
        return x
    shortcut: Tensor = block.avg_shortcut(before, first_chunk=True).permute(0, 2, 3, 4, 1)
    return shortcut + _upsample(block.upsampler, x)


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    frames: Tensor = layer.resample(x.flatten(0, 1).permute(0, 3, 1, 2))
    frames = frames.permute(0, 2, 3, 1)
    return frames.reshape(*x.shape[:2], *frames.shape[1:])


def _downsample(layer: WanResample, x: Tensor) -> Tensor:
    x = _resample(layer, x)
    if layer.mode == "downsample3d" and x.shape[1] > 1:
        taps = [x[:, i : x.shape[1] - 2 + i : 2] for i in range(3)]
        x = torch.cat([x[:, :1], _time_conv(layer.time_conv, taps)], dim=1)
    return x


def _upsample(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[1] > 1:
        doubled = _causal_conv(layer.time_conv, x[:, 1:])
        doubled = doubled.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        x = torch.cat([x[:, :1], doubled], dim=1)
    return _resample(layer, x)
