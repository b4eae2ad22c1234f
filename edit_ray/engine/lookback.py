"""How far back the frames at a point of a latent stream depend on it: from the VAE's configuration, without torch."""

import math
from collections.abc import Mapping
from typing import Any


def lookback_latents(vae_config: Mapping[str, Any]) -> int:
    """Latents that must be decoded anew before a point of the stream so that all frames after it are bit-equal.

    Every causal convolution over time looks back two frames, each 1/rate latents long, where the rate doubles at each
    temporal upsampling. Their sum is the decoder's view to the past. One latent more is the one being decoded, and the
    first two of a rebuilt stream are special: the decoder emits one frame for the first and pads the second.
    """
    per_residual_block = 2 * 2  # two convolutions
    per_level = per_residual_block * (vae_config.get("num_res_blocks", 2) + 1)
    rate = 1
    view: float = 2 + 2 * per_residual_block  # the first convolution and the middle block
    for upsamples_time in [*reversed(vae_config.get("temperal_downsample", [False, True, True])), False]:
        view += per_level / rate
        if upsamples_time:
            view += 2 / rate
            rate *= 2
    view += 2 / rate  # the last convolution
    return math.ceil(view) + 1 + 2
