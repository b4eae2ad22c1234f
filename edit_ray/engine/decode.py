"""Decodes a stream of latents segment by segment, to the same bits however it is cut.

Wan's decoder is causal: it takes one latent frame at a time and keeps, per convolution, the last two frames that it
saw (the feature cache). Carried over from segment to segment, that cache makes the cut invisible. It is large and need
not be stored: `lookback_latents` says how many latents must be decoded again to rebuild all of it that matters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from edit_ray.engine.lookback import lookback_latents


def denormalise(latents: Tensor, vae_config: Mapping[str, Any]) -> Tensor:
    """Normalised latents [B, C, T, h, w] in the scale that the VAE decodes; operation by operation as diffusers."""
    shape = (1, vae_config["z_dim"], 1, 1, 1)
    mean = torch.tensor(vae_config["latents_mean"]).view(shape).to(latents.device, latents.dtype)
    inverse_std = 1.0 / torch.tensor(vae_config["latents_std"]).view(shape).to(latents.device, latents.dtype)
    return latents / inverse_std + mean


def to_uint8(video: Tensor) -> Tensor:
    """Video [1, 3, F, H, W] in [-1, 1] as uint8 [F, H, W, 3]: diffusers' "np" frames times 255, rounded."""
    frames = (video[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
    return frames.float().mul(255).round().to(torch.uint8)


def to_pixels(vae: AutoencoderKLWan, patches: Tensor) -> Tensor:
    """What the VAE's decoder returns, [1, c, F, H', W'], as video [1, 3, F, H, W] in [-1, 1]."""
    patch_size = vae.config.patch_size
    return (patches if patch_size is None else unpatchify(patches, patch_size)).clamp(-1.0, 1.0)


class StreamingDecoder:
    """Decodes one stream of normalised latents in order, however it is cut.

    Its bits are those of `vae.decode` without tiling or slicing, unless the machine's kernels give several latents
    at once (`post_quant_conv`) other last bits than one. The VAE itself holds no state of the stream.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self.lookback = lookback_latents(vae.config)
        self.reset()

    @property
    def position(self) -> int:
        """Latents of the stream decoded so far: the index of the one that must come next."""
        return self._position

    def reset(self) -> None:
        """Forget the stream: the next latent is the first of a new one."""
        convolutions = sum(isinstance(module, WanCausalConv3d) for module in self._vae.decoder.modules())
        self._feature_cache: list[Any] = [None] * convolutions
        self._position = 0
        self._starts = True

    @torch.no_grad()
    def rebuild(self, preceding: Tensor, position: int) -> None:
        """Bring the decoder to `position` of a stream of which `preceding` [1, C, n, h, w] are the last latents before.

        Raises `ValueError` if n is less than `min(position, lookback)`, which is what must be decoded again.
        """
        needed = min(position, self.lookback)
        if preceding.shape[2] < needed:
            raise ValueError(
                f"{preceding.shape[2]} latents do not rebuild the decoder at latent {position}; it takes {needed}."
            )
        self.reset()
        if needed:
            for latent in self._prepare(preceding[:, :, -needed:]).split(1, dim=2):
                self._step(latent)
        self._position = position

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The stream's next normalised latents [1, C, n, h, w] as video [1, 3, F, H, W] in [-1, 1].

        F is 4n, or 4n - 3 at the start of the stream. After an error the decoder is reset.
        """
        return to_pixels(self._vae, self.decode_patches(latents))

    @torch.no_grad()
    def decode_patches(self, latents: Tensor) -> Tensor:
        """As `decode`, before `to_pixels`: what the decoder itself returns."""
        try:
            return torch.cat([self._step(latent) for latent in self._prepare(latents).split(1, dim=2)], dim=2)
        except BaseException:
            self.reset()  # half a feature cache would decode to wrong frames, silently
            raise

    def move_state(self, device: torch.device | str) -> None:
        """Keep the stream's state on another device; it must be on the VAE's to decode."""
        self._feature_cache = [kept.to(device) if isinstance(kept, Tensor) else kept for kept in self._feature_cache]

    def _prepare(self, latents: Tensor) -> Tensor:
        return denormalise(latents.to(self._vae.device, self._vae.dtype), self._vae.config)

    def _step(self, latent: Tensor) -> Tensor:
        """One latent [1, C, 1, h, w] to [1, c, 1 or 4, H', W']; alone, so that the bits do not depend on the cut."""
        latent = self._vae.post_quant_conv(latent)
        frames: Tensor = self._vae.decoder(
            latent, feat_cache=self._feature_cache, feat_idx=[0], first_chunk=self._starts
        )
        self._starts = False
        self._position += 1
        return frames
