"""One run's latent stream through the VAE: its latents as frames, and its last frames as the next segment's context."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from edit_ray.engine.decode import StreamingDecoder, latent_scale
from edit_ray.engine.options import ContinuityOptions

Preceding = Callable[[int], Tensor]
"""Returns the last `count` latents [1, C, count, h, w] before a position of the stream."""


class RunStream:
    """Decodes a run's latents in order; one caller of `decode` at a time.

    Frames depend on latents alone, and on `tiled_from`: from this position of the stream on, if given, they are decoded
    in tiles. The decoder's state and the last frames only save decoding them again.
    """

    def __init__(self, vae: AutoencoderKLWan, tiled_from: int | None = None) -> None:
        self._vae = vae
        self.tiled_from = tiled_from
        self._decoder = StreamingDecoder(vae)
        self._end: tuple[int, Tensor] | None = None  # a position, and the last frames before it

    def decode(
        self, latents: Tensor, position: int, preceding: Preceding | None = None, keep_frames: int = 0
    ) -> Tensor:
        """The latents [1, C, n, h, w] at `position` as video [1, 3, F, H, W] in [-1, 1], all in tiles or none.

        A decoder at another position is rebuilt from `preceding`; raises `ValueError` without it. The last
        `keep_frames` frames stay for `last_frames`.
        """
        self._seek(position, preceding)
        video = self._decoder.decode(latents)
        before = self._end[1] if self._end is not None and self._end[0] == position else video[:, :, :0]
        kept = torch.cat([before.to(video.device), video], dim=2)[:, :, -keep_frames:] if keep_frames else None
        self._end = None if kept is None else (self._decoder.position, kept.clone())
        return video

    def last_frames(self, count: int, position: int, preceding: Preceding) -> Tensor:
        """The last `count` frames [1, 3, count, H, W] in [-1, 1] that the latents before `position` decode to."""
        end = self._end
        if end is not None and end[0] == position and end[1].shape[2] >= count:
            return end[1][:, :, -count:]
        new = min(position, math.ceil((count - 1) / 4) + 1)
        latents = preceding(min(position, new + self._decoder.lookback))
        start = position - latents.shape[2]  # the position of the first of them
        tiled_from = min(max(position - new, position if self.tiled_from is None else self.tiled_from), position)
        video = []
        for first, last in ((position - new, tiled_from), (tiled_from, position)):
            if first < last:
                decoder = self._decoder_for(first)  # the stream's own may be in use
                decoder.rebuild(latents[:, :, : first - start], first)
                video.append(decoder.decode(latents[:, :, first - start : last - start]))
        return torch.cat([part.to(video[-1].device) for part in video], dim=2)[:, :, -count:]

    def context(self, continuity: ContinuityOptions, position: int, preceding: Preceding) -> dict[str, Tensor]:
        """What the segment after `position` latents continues: `history` or `overlap` [1, C, k, h, w], or nothing.

        Float32, on the latents' device. With `image` it is the last frame, in the 256 levels in which it is shown. With
        `overlap_source: hybrid` the first slot stands for a single frame, as the first latent of any clip does; in the
        stream it stood for four.
        """
        slots = continuity.carried_latents
        if not slots:
            return {}
        if continuity.mode == "image":
            shown = self.last_frames(1, position, preceding) * 0.5 + 0.5
            shown = shown.float().mul(255).round() / 127.5 - 1  # operation by operation as `to_uint8` and `to_video`
            return {"history": encode_picture(self._vae, shown, continuity)[:, :, -1:].cpu()}
        latents = preceding(slots)
        if not continuity.carried_frames:
            return {continuity.mode: latents}
        frames = self.last_frames(continuity.carried_frames, position, preceding)
        if continuity.overlap_source == "reencode":
            return {"overlap": encode_video(self._vae, frames).to(latents.device)}
        first = encode_video(self._vae, frames[:, :, :1]).to(latents.device)
        return {"overlap": torch.cat([first, latents[:, :, 1:]], dim=2)}

    def _seek(self, position: int, preceding: Preceding | None) -> None:
        other = self._decoder_for(position)
        if other.tiled != self._decoder.tiled:
            self._decoder = other
        decoder = self._decoder
        if position == 0:
            decoder.reset()
        elif decoder.position != position:
            if preceding is None:
                raise ValueError(f"The stream is decoded up to latent {decoder.position}, not {position}.")
            decoder.rebuild(preceding(min(position, decoder.lookback)), position)

    def _decoder_for(self, position: int) -> StreamingDecoder:
        tiled = self.tiled_from is not None and position >= self.tiled_from
        return StreamingDecoder(self._vae, tiled=tiled)


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Frames, uint8 [F, H, W, 3], as video [1, 3, F, H, W] in [-1, 1]: the inverse of `to_uint8`."""
    return (torch.tensor(frames).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def encode_picture(vae: AutoencoderKLWan, picture: Tensor, continuity: ContinuityOptions) -> Tensor:
    """A picture [B, 3, 1, H, W] as its latent, and with `picture_as: still` behind it the one of `encode_still`."""
    return (encode_still if continuity.picture_as == "still" else encode_video)(vae, picture)


def encode_still(vae: AutoencoderKLWan, picture: Tensor) -> Tensor:
    """A picture [B, 3, 1, H, W] as [B, C, 2, h, w]: alone, and as a later latent of a clip that stands still."""
    return encode_video(vae, picture.expand(-1, -1, 5, -1, -1))


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """A clip [B, 3, 4(k-1)+1, H, W] in [-1, 1] as normalised latents [B, C, k, h, w], float32.

    The most likely latents; nothing is drawn. Raises `ValueError` for another number of frames.
    """
    if video.shape[2] % 4 != 1:
        raise ValueError(f"A clip of {video.shape[2]} frames cannot be encoded; it takes 4k+1.")
    latents: Tensor = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, inverse_std = latent_scale(latents, vae.config)
    return (latents - mean) * inverse_std
