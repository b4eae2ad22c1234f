"""How a segment continues its predecessor: what `history` does to the latents.

The first k slots of the segment's T hold the clean last k latents of its predecessor at every step. Which frames that
makes is `edit_ray.runs.layout`'s arithmetic.
"""

from torch import Tensor, cat


def check_history(history: Tensor, latents: Tensor) -> Tensor:
    """Return `history` on the device and in the dtype of `latents` [B, C, T, h, w].

    Raises `ValueError` unless it is [B, C, k, h, w] with 1 <= k < T.
    """
    batch, channels, slots, height, width = latents.shape
    given = tuple(history.shape)
    if len(given) != 5 or given[2] == 0 or given != (batch, channels, given[2], height, width):
        raise ValueError(
            f"`history` has the shape {given}; valid is [B, C, k, h, w] = "
            f"({batch}, {channels}, k, {height}, {width}) for these latents."
        )
    if given[2] >= slots:
        raise ValueError(
            f"{given[2]} history latents leave nothing to denoise in a window of {slots} latent frames; "
            f"valid are 1 to {slots - 1}."
        )
    return history.to(device=latents.device, dtype=latents.dtype)


def hold_history(latents: Tensor, history: Tensor | None) -> Tensor:
    """`latents` [B, C, T, h, w] with its first k slots replaced by `history` [B, C, k, h, w]; unchanged without one."""
    return latents if history is None else cat([history, latents[:, :, history.shape[2] :]], dim=2)
