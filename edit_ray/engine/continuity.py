"""How a segment continues its predecessor: what fills the first k of its T latent slots, its context, at every step.

`history` shows the context clean, at timestep 0, to models with per-token timesteps. `overlap` shows it at the noise
level of each step, as any text-to-video model knows it, so that the other slots fit to it: inpainting along time, after
A. Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models" (2022), for flow matching and
without its resampling. Which frames that makes is `edit_ray.runs.run_plan`'s arithmetic.
"""

from dataclasses import dataclass

from torch import Tensor, cat


@dataclass(frozen=True)
class Held:
    """What the first k slots of a segment are while it is denoised.

    `context` [B, C, k, h, w] are clean latents. With `noise` of the same shape they are mixed with it as sigma says;
    without, they stay clean and see timestep 0.
    """

    context: Tensor
    noise: Tensor | None = None

    @property
    def slots(self) -> int:
        """k."""
        return self.context.shape[2]

    def at(self, sigma: float) -> Tensor:
        """The k slots at a noise level from 1 to 0, [B, C, k, h, w]."""
        return self.context if self.noise is None else (1 - sigma) * self.context + sigma * self.noise


def hold(latents: Tensor, held: Held | None, sigma: float) -> Tensor:
    """`latents` [B, C, T, h, w] with what is held in their first k slots, at this noise level; unchanged without it."""
    return latents if held is None else cat([held.at(sigma), latents[:, :, held.slots :]], dim=2)


def check_context(name: str, context: Tensor, latents: Tensor) -> Tensor:
    """Return the argument `name` on the device and in the dtype of `latents` [B, C, T, h, w].

    Raises `ValueError` unless it is [B, C, k, h, w] with 1 <= k < T.
    """
    batch, channels, slots, height, width = latents.shape
    given = tuple(context.shape)
    if len(given) != 5 or given[2] == 0 or given != (batch, channels, given[2], height, width):
        raise ValueError(
            f"`{name}` has the shape {given}; valid is [B, C, k, h, w] = "
            f"({batch}, {channels}, k, {height}, {width}) for these latents."
        )
    if given[2] >= slots:
        raise ValueError(
            f"{given[2]} latents of `{name}` leave nothing to denoise in a window of {slots} latent frames; "
            f"valid are 1 to {slots - 1}."
        )
    return context.to(device=latents.device, dtype=latents.dtype)


def match_statistics(latents: Tensor, reference: Tensor, factor: float) -> Tensor:
    """`latents` [B, C, n, h, w], moved by `factor` (0 to 1) towards the mean and deviation of each reference channel.

    Source: X. Huang, S. Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization" (2017);
    here statistics are over time as well.
    """
    dims = (2, 3, 4)
    deviation = latents.std(dims, keepdim=True).clamp_min(1e-6)
    moved = (latents - latents.mean(dims, keepdim=True)) / deviation
    moved = moved * reference.std(dims, keepdim=True) + reference.mean(dims, keepdim=True)
    return latents + factor * (moved - latents)
