"""The reference for decoding a stream: Wan's decoder, applied latent by latent.

diffusers applies `post_quant_conv` to all latents at once. On some CPUs this selects another kernel than a single
latent does, and the frames differ in the last bit. On such a machine the two must agree to one step of 255.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from edit_ray.engine.decode import denormalise, to_uint8


@torch.no_grad()
def decode_latent_by_latent(vae, latents):
    """Normalised latents [1, C, T, h, w] as video [1, 3, F, H, W], by the VAE's own parts and none of the engine's."""
    vae.clear_cache()
    parts = []
    for latent in denormalise(latents, vae.config).split(1, dim=2):
        alone, vae._conv_idx = vae.post_quant_conv(latent), [0]
        parts.append(vae.decoder(alone, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=not parts))
    vae.clear_cache()
    video, patch_size = torch.cat(parts, dim=2), vae.config.patch_size
    return torch.clamp(video if patch_size is None else unpatchify(video, patch_size), -1.0, 1.0)


@torch.no_grad()
def decode_at_once(vae, latents):
    """The same, once it is checked against diffusers' decoding of all latents at once."""
    stream, whole = decode_latent_by_latent(vae, latents), vae.decode(denormalise(latents, vae.config)).sample
    if one_kernel(vae, latents):
        assert torch.equal(stream, whole)
    assert (to_uint8(stream).int() - to_uint8(whole).int()).abs().max() <= 1
    return stream


@torch.no_grad()
def one_kernel(vae, latents):
    """Whether this machine's `post_quant_conv` gives equal bits for these latents at once and one by one."""
    latents = denormalise(latents, vae.config)
    one_by_one = torch.cat([vae.post_quant_conv(latent) for latent in latents.split(1, dim=2)], dim=2)
    return torch.equal(vae.post_quant_conv(latents), one_by_one)
