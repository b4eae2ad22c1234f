"""What a mean over some prompts says of others: intervals by resampling the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 10_000


def resampled_means(values: Sequence[float], seeds: int, resamples: int = RESAMPLES) -> Tensor:
    """Means [resamples] of as many prompts, drawn with replacement from a fixed seed, each with all its `seeds` values.

    Videos of one prompt are no independent samples.
    """
    prompts = torch.tensor(values, dtype=torch.float64).view(-1, seeds).mean(1)
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=torch.Generator().manual_seed(0))
    return prompts[drawn].mean(1)


def least_of_others(values: Sequence[float], seeds: int) -> float:
    """What the mean over as many other prompts of the same kind is above, with 95 % confidence; -inf for one prompt.

    The mean over these prompts is as uncertain as that over the others, so two resampled means are drawn for the two.
    Their spread is widened by the root of n / (n - 1), as n resampled prompts vary less than n new ones. Of a
    distribution with a long tail downwards few prompts say too little: of a lognormal one, 20 are right in 84 %.
    """
    prompts = len(values) // seeds
    if prompts < 2:
        return float("-inf")
    mean = sum(values) / len(values)
    here, there = (resampled_means(values, seeds, 2 * RESAMPLES) - mean).chunk(2)
    spread = (here + there) * (prompts / (prompts - 1)) ** 0.5
    below: float = spread.quantile(0.05).item()
    return mean + below
