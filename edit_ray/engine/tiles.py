"""Decoding a stream of latents in tiles, one after the other: where the GPU's memory does not do for whole frames."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from edit_ray.engine.decode import StreamingDecoder, to_pixels
from edit_ray.engine.lookback import lookback_latents

_Tile = tuple[slice, slice]  # rows and columns of the latents


class TiledDecoder:
    """Decodes as `StreamingDecoder`, each tile of the frames as a stream of its own.

    Only the tile that is being decoded is on the VAE's device; the others' states and the frames are on the CPU. Tiles
    overlap and are blended where they do, after `AutoencoderKLWan.tiled_decode` of diffusers, whose bits these are;
    their size and stride are the VAE's own (`tile_sample_min_height` and so on, in pixels). Where tiles meet the frames
    are not those of whole decoding, as a tile sees nothing beyond its border.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self.lookback = lookback_latents(vae.config)
        self._streams: dict[tuple[int, int], StreamingDecoder] = {}  # by the first row and column

    @property
    def position(self) -> int:
        """Latents of the stream decoded so far."""
        return next((stream.position for stream in self._streams.values()), 0)

    def reset(self) -> None:
        """Forget the stream: the next latent is the first of a new one."""
        self._streams.clear()

    def rebuild(self, preceding: Tensor, position: int) -> None:
        """As `StreamingDecoder.rebuild`; raises `ValueError` as it does."""
        self.reset()
        for rows, columns in (tile for row in self._grid(preceding) for tile in row):
            stream = self._stream(rows, columns)
            stream.rebuild(preceding[..., rows, columns], position)
            stream.move_state("cpu")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The stream's next normalised latents [1, C, n, h, w] as video [1, 3, F, H, W] in [-1, 1], on the CPU.

        After an error the decoder is reset.
        """
        try:
            tiles = [[self._decode_tile(latents, *tile) for tile in row] for row in self._grid(latents)]
        except BaseException:
            self.reset()
            raise
        return to_pixels(self._vae, self._blend(tiles))

    def _decode_tile(self, latents: Tensor, rows: slice, columns: slice) -> Tensor:
        stream = self._stream(rows, columns)
        stream.move_state(self._vae.device)
        patches = stream.decode_patches(latents[..., rows, columns]).cpu()
        stream.move_state("cpu")
        return patches

    def _stream(self, rows: slice, columns: slice) -> StreamingDecoder:
        return self._streams.setdefault((rows.start, columns.start), StreamingDecoder(self._vae))

    def _grid(self, latents: Tensor) -> list[list[_Tile]]:
        vae, factor = self._vae, self._vae.spatial_compression_ratio
        rows = _cuts(latents.shape[-2], vae.tile_sample_min_height // factor, vae.tile_sample_stride_height // factor)
        columns = _cuts(latents.shape[-1], vae.tile_sample_min_width // factor, vae.tile_sample_stride_width // factor)
        return [[(row, column) for column in columns] for row in rows]

    def _blend(self, tiles: list[list[Tensor]]) -> Tensor:
        """Rows of tiles [1, c, F, H', W'] as one; each tile is faded in over the ones above and to its left."""
        vae, patch = self._vae, self._vae.config.patch_size or 1
        height, width = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
        over_rows, over_columns = (
            vae.tile_sample_min_height // patch - height,
            vae.tile_sample_min_width // patch - width,
        )
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
