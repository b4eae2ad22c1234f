"""Searches for the policy and threshold that compute least on the user's prompts and keep the mean PSNR high enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from edit_ray.cache.cache import Cache
from edit_ray.engine.calibration import WHOLE
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.tuning.likeness import psnr

# The option of each policy that makes it skip more as it rises, and the range in which it is searched. Policies with a
# calibration come first: the better the first find, the sooner the others are known to be slower.
TUNABLE: dict[str, tuple[str, float, float]] = {
    "ranked": ("skips", 1, 1000),
    "lemica": ("skips", 1, 1000),
    "dicache": ("rel_l1_thresh", 0.003, 3.0),
    "fbcache": ("rel_l1_thresh", 0.003, 3.0),
    "seacache": ("threshold", 0.003, 3.0),
    "teacache": ("rel_l1_thresh", 0.003, 3.0),
}
TRIALS = 7  # halvings of the range of log(threshold) for each policy
CONFIDENCE = 1.64  # standard errors between the measured mean and the one that is relied upon: 95 %
_SOONEST = 4  # videos before a setting is given up

Verdict = Literal["holds", "too far", "slower"]


@dataclass(frozen=True)
class Trial:
    """One setting, measured on some videos.

    `psnr` is the mean in dB against the uncached frames and `low` its lower bound with 95 % confidence; `blocks` the
    share of the blocks that ran. "slower" computed more than a setting that holds already.
    """

    policy: str
    options: dict[str, Any]
    psnr: float
    low: float
    blocks: float
    verdict: Verdict


class PolicyUnfit(Exception):
    """A policy cannot run on this model, for example because it needs a calibration."""


Measure = Callable[[str, Mapping[str, Any]], Iterator[tuple[float, float]]]
"""Makes one video after the other with a policy's options, and yields the PSNR and the share of blocks of each."""


def tune(measure: Measure, psnr: float, policies: Sequence[str] = tuple(TUNABLE)) -> Iterator[Trial]:
    """Every tried setting, in search of the one that computes least while its mean PSNR is at least `psnr`.

    Per policy the threshold is found by halving. PSNR does not fall evenly with it, so a setting counts by its own
    measurements: with 95 % confidence its mean holds on other prompts of the same kind. A setting that cannot hold any
    more, or is slower than one that holds, is given up before all videos are made.
    """
    least = math.inf
    for policy in policies:
        option, lowest, highest = TUNABLE[policy]
        low, high = math.log(lowest), math.log(highest)
        tried = set()
        for _ in range(TRIALS):
            middle = math.exp((low + high) / 2)
            value = round(middle) if option in WHOLE else float(f"{middle:.3g}")
            if value in tried:
                break
            tried.add(value)
            try:
                trial = _try(measure, policy, {option: value}, psnr, least)
            except PolicyUnfit:
                break
            yield trial
            if trial.verdict == "holds":
                least = trial.blocks
            low, high = (low, math.log(value)) if trial.verdict == "too far" else (math.log(value), high)


def _try(measure: Measure, policy: str, options: dict[str, Any], psnr: float, least: float) -> Trial:
    psnrs: list[float] = []
    shares: list[float] = []
    given_up: Verdict | None = None
    for measured, share in measure(policy, options):
        psnrs.append(measured)
        shares.append(share)
        mean, blocks = statistics.fmean(psnrs), statistics.fmean(shares)
        # The standard error of the mean; a single video says nothing of it.
        error = float(np.std(psnrs, ddof=1)) / math.sqrt(len(psnrs)) if len(psnrs) > 1 else math.inf
        if len(psnrs) >= _SOONEST:
            given_up = "too far" if mean + CONFIDENCE * error < psnr else "slower" if blocks >= least else None
        if given_up:
            break
    low = mean - CONFIDENCE * error
    return Trial(policy, options, mean, low, blocks, given_up or ("holds" if low >= psnr else "too far"))


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial that computed least of those that hold; None if none does."""
    good = [trial for trial in trials if trial.verdict == "holds"]
    return min(good, key=lambda trial: (trial.blocks, -trial.psnr), default=None)


class Videos:
    """A `Measure` on `prompts`, `seeds` videos of each, with seeds from `seed` on.

    `call` has the pipeline's other arguments.
    """

    def __init__(
        self, pipe: EditWanPipeline, prompts: Sequence[str], seed: int, call: Mapping[str, Any], seeds: int = 1
    ) -> None:
        self.pipe, self.call = pipe, dict(call)
        self._samples = [
            (prompt, seed + index * seeds + nth) for index, prompt in enumerate(prompts) for nth in range(seeds)
        ]
        self._reference = [self._frames(index) for index in range(len(self._samples))]

    def __call__(self, policy: str, options: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
        """PSNR in dB and share of computed blocks, video by video.

        Raises PolicyUnfit.
        """
        for index, reference in enumerate(self._reference):
            try:
                cache = self.pipe.enable_cache(
                    policy, self.call["num_inference_steps"], sigmas=self.call.get("sigmas"), **options
                )
            except (ValueError, TypeError) as error:
                raise PolicyUnfit(str(error)) from error
            try:
                measured = psnr(self._frames(index), reference), blocks_share(cache)
            finally:
                self.pipe.disable_cache()
            yield measured

    def __len__(self) -> int:
        return len(self._samples)

    def _frames(self, index: int) -> Tensor:
        prompt, seed = self._samples[index]
        generator = torch.Generator().manual_seed(seed)
        video = self.pipe(prompt, generator=generator, output_type="pt", return_dict=False, **self.call)[0]
        frames: Tensor = video.cpu()
        return frames


def blocks_share(cache: Cache) -> float:
    """Blocks that ran in the last call, probes included, over those of an uncached one."""
    size = {(name, unit.index): unit.last - unit.first + 1 for name, e in cache.experts.items() for unit in e.units}
    total = sum(size[d.expert, d.unit] for d in cache.record)
    probe = int(cache.policy.needs_first_block_probe)
    entered = [d for d in cache.record if d.reason != "gate"]
    ran = sum(size[d.expert, d.unit] if d.decision == "compute" else probe for d in entered)
    return ran / total
