"""Decodes a stream of latents segment by segment, to the same bits however it is cut, whole or in tiles.

Wan's decoder is causal: it takes one latent frame at a time and stores, per convolution, the last two frames that it
saw (the feature cache). Carried over from segment to segment, that cache makes the cut invisible. It is large and need
not be stored: `lookback_latents` says how many latents must be decoded again to rebuild all of it that matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from edit_ray.engine.model_info import lookback_latents

Tile = tuple[slice, slice]
"""Rows and columns of the latents."""


def latent_scale(latents: Tensor, vae_config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation [1, C, 1, 1, 1] of a VAE's latents; operation by operation as diffusers."""
    shape = (1, vae_config["z_dim"], 1, 1, 1)
    mean = torch.tensor(vae_config["latents_mean"]).view(shape).to(latents.device, latents.dtype)
    return mean, 1.0 / torch.tensor(vae_config["latents_std"]).view(shape).to(latents.device, latents.dtype)


def denormalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Normalised latents [B, C, T, h, w] in the scale that the VAE decodes."""
    mean, inverse_std = latent_scale(latents, vae_config)
    return latents / inverse_std + mean


def to_uint8(video: Tensor) -> Tensor:
    """Video [1, 3, F, H, W] in [-1, 1] as uint8 [F, H, W, 3]: diffusers' "np" frames times 255, rounded."""
    frames = (video[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    return frames.float().mul(255).round().to(torch.uint8)


class StreamingDecoder:
    """Decodes one stream of normalised latents in order, however it is cut.

    Its bits are those of `vae.decode` without tiling or slicing, unless the machine's kernels give several latents
    at once (`post_quant_conv`) other last bits than one. The VAE itself holds no state of the stream.

    With `tiled`, each tile of the frames is a stream of its own, for a GPU without the memory for whole frames. Only
    the current tile is on the VAE's device; the other tiles' states and the frames are on the CPU. Tiles overlap and
    are blended there as in diffusers' `AutoencoderKLWan.tiled_decode`, with its bits, and with the VAE's own sizes and
    strides (`tile_sample_min_height` and so on, in pixels). Frames differ from whole ones where tiles meet.
    """

    def __init__(self, vae: AutoencoderKLWan, *, tiled: bool = False) -> None:
        self._vae, self.tiled = vae, tiled
        self.lookback = lookback_latents(vae.config)
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next latent is the first of a new one."""
        self.position = 0  # latents decoded so far: the index of the one that must come next
        self._feature_caches: dict[tuple[int, int], list[Any]] = {}  # by a tile's first row and column

    @torch.no_grad()
    def rebuild(self, preceding: Tensor, position: int) -> None:
        """Move to `position` of a stream in which `preceding` [1, C, n, h, w] are the last latents before it.

        Raises `ValueError` if n is less than `min(position, lookback)`, which must be decoded again.
        """
        needed = min(position, self.lookback)
        if preceding.shape[2] < needed:
            raise ValueError(
                f"{preceding.shape[2]} latents do not rebuild the decoder at latent {position}; it takes {needed}."
            )
        self.reset()
        if needed:
            for tile in (tile for row in self._grid(preceding) for tile in row):
                for _ in self._decode_tile(preceding[:, :, -needed:], *tile):
                    pass
        self.position = position

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The stream's next normalised latents [1, C, n, h, w] as video [1, 3, F, H, W] in [-1, 1].

        F is 4n, or 4n - 3 at the start of the stream. After an error the decoder is reset.
        """
        try:
            tiles = [
                [torch.cat(list(self._decode_tile(latents, *tile)), dim=2) for tile in row]
                for row in self._grid(latents)
            ]
        except BaseException:
            self.reset()  # half a feature cache would decode to wrong frames, silently
            raise
        self.position += latents.shape[2]
        frames, patch_size = self._blend(tiles) if self.tiled else tiles[0][0], self._vae.config.patch_size
        return (frames if patch_size is None else unpatchify(frames, patch_size)).clamp(-1.0, 1.0)

    def _decode_tile(self, latents: Tensor, rows: slice, columns: slice) -> Iterator[Tensor]:
        """Each latent [1, C, 1, h, w] as [1, c, 1 or 4, H', W']; alone, so that the bits do not depend on the cut."""
        vae, tile = self._vae, (rows.start, columns.start)
        starts = tile not in self._feature_caches
        if starts:
            convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
            self._feature_caches[tile] = [None] * convolutions
        cache = _moved(self._feature_caches[tile], vae.device) if self.tiled else self._feature_caches[tile]
        latents = denormalise(latents[..., rows, columns].to(vae.device, vae.dtype), vae.config)
        for latent in latents.split(1, dim=2):
            frames = vae.decoder(vae.post_quant_conv(latent), feat_cache=cache, feat_idx=[0], first_chunk=starts)
            yield frames.cpu() if self.tiled else frames
            starts = False
        if self.tiled:
            self._feature_caches[tile] = _moved(cache, "cpu")

    def _grid(self, latents: Tensor) -> list[list[Tile]]:
        height, width = latents.shape[-2:]
        if not self.tiled:
            return [[(slice(0, height), slice(0, width))]]
        vae, factor = self._vae, self._vae.spatial_compression_ratio
        rows = _cuts(height, vae.tile_sample_min_height // factor, vae.tile_sample_stride_height // factor)
        columns = _cuts(width, vae.tile_sample_min_width // factor, vae.tile_sample_stride_width // factor)
        return [[(row, column) for column in columns] for row in rows]

    def _blend(self, tiles: list[list[Tensor]]) -> Tensor:
        """Rows of tiles [1, c, F, H', W'] as one; each tile is faded in over the ones above and to its left."""
        vae, patch = self._vae, self._vae.config.patch_size or 1
        height, width = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        over_rows = vae.tile_sample_min_height // patch - height
        over_columns = vae.tile_sample_min_width // patch - width
        for i, row in enumerate(tiles):
            for j, tile in enumerate(row):
                if i > 0:
                    vae.blend_v(tiles[i - 1][j], tile, over_rows)
                if j > 0:
                    vae.blend_h(row[j - 1], tile, over_columns)
        shown = [torch.cat([tile[..., :height, :width] for tile in row], dim=-1) for row in tiles]
        return torch.cat(shown, dim=-2)


def _cuts(length: int, tile: int, stride: int) -> list[slice]:
    return [slice(start, min(start + tile, length)) for start in range(0, length, stride)]


def _moved(feature_cache: list[Any], device: torch.device | str) -> list[Any]:
    return [kept.to(device) if isinstance(kept, Tensor) else kept for kept in feature_cache]
