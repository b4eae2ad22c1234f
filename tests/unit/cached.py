"""What tests of the cache do with the fixture `pipe`."""

import torch

from edit_ray.cache import CachePolicy
from tests.calls import TINY


class Mask(CachePolicy):
    """Computes where its mask says so; remembers every embedding that it was shown."""

    def __init__(self, mask=(True,) * 5, timestep_only=True):
        self.mask, self.timestep_only, self.seen = mask, timestep_only, []

    def should_compute(self, ctx):
        self.seen.append((ctx.step, ctx.branch, ctx.e, ctx.e0))
        return self.mask[ctx.step]


def latents(pipe, seed=0, **changes):
    return pipe(**(TINY | changes), generator=torch.Generator().manual_seed(seed))[0]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
