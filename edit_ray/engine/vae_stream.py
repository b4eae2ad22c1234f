"""The stream of one run's latents on its way to frames, and the frames in which it ends."""

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from edit_ray.engine.decode import StreamingDecoder
from edit_ray.engine.encode import encode
from edit_ray.engine.options import ContinuityOptions
from edit_ray.engine.tiles import TiledDecoder

Preceding = Callable[[int], Tensor]
"""Returns the last `count` latents [1, C, count, h, w] before a position of the stream."""


class RunStream:
    """Decodes a run's latents in order, from where they are asked for; one caller of `decode` at a time.

    Frames depend on latents alone, and on `tiled_from`: from this position of the stream on, where it is given, they
    are decoded in tiles. What is at hand only saves that it is decoded again.
    """

    def __init__(self, vae: AutoencoderKLWan, tiled_from: int | None = None) -> None:
        self._vae = vae
        self.tiled_from = tiled_from
        self._decoder: StreamingDecoder | TiledDecoder = StreamingDecoder(vae)
        self._end: tuple[int, Tensor] | None = None  # a position, and the last frames before it

    @property
    def position(self) -> int:
        """Latents decoded so far."""
        return self._decoder.position

    def decode(
        self, latents: Tensor, position: int, preceding: Preceding | None = None, keep_frames: int = 0
    ) -> Tensor:
        """The latents [1, C, n, h, w] at `position` as video [1, 3, F, H, W] in [-1, 1].

        Where the decoder is elsewhere it is rebuilt from `preceding`; raises `ValueError` without it. The last
        `keep_frames` frames stay for `last_frames`. All of the latents are decoded in tiles, or none.
        """
        self._go_to(position, preceding)
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
                decoder = self._decoder_for(first)  # the stream's own may be at work
                decoder.rebuild(latents[:, :, : first - start], first)
                video.append(decoder.decode(latents[:, :, first - start : last - start]))
        return torch.cat([part.to(video[-1].device) for part in video], dim=2)[:, :, -count:]

    def context(self, continuity: ContinuityOptions, position: int, preceding: Preceding) -> dict[str, Tensor]:
        """What the segment after `position` latents continues: `history` or `overlap` [1, C, k, h, w], or nothing.

        Float32, on the latents' device. Of `overlap_source: hybrid` the first slot stands for a single
        frame, as the first latent of any clip does, where it stood for four in the stream.
        """
        slots = continuity.carried_latents
        if not slots:
            return {}
        latents = preceding(slots)
        if not continuity.carried_frames:
            return {continuity.mode: latents}
        frames = self.last_frames(continuity.carried_frames, position, preceding)
        if continuity.overlap_source == "reencode":
            return {"overlap": encode(self._vae, frames).to(latents.device)}
        first = encode(self._vae, frames[:, :, :1]).to(latents.device)
        return {"overlap": torch.cat([first, latents[:, :, 1:]], dim=2)}

    def _go_to(self, position: int, preceding: Preceding | None) -> None:
        other = self._decoder_for(position)
        if type(other) is not type(self._decoder):
            self._decoder = other
        decoder = self._decoder
        if position == 0:
            decoder.reset()
        elif decoder.position != position:
            if preceding is None:
                raise ValueError(f"The stream is decoded up to latent {decoder.position}, not {position}.")
            decoder.rebuild(preceding(min(position, decoder.lookback)), position)

    def _decoder_for(self, position: int) -> StreamingDecoder | TiledDecoder:
        tiled = self.tiled_from is not None and position >= self.tiled_from
        return TiledDecoder(self._vae) if tiled else StreamingDecoder(self._vae)
