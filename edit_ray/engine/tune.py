"""Finding, on the user's own model and prompts, the policy that computes least and keeps the frames close enough."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from edit_ray.cache.cache import Cache
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.targets import WHOLE

# Each with the option that makes it skip more as it rises, and the range in which that is looked for. What has a
# calibration of its own comes first: the better the first find, the sooner the others are seen to be slower.
TUNABLE: dict[str, tuple[str, float, float]] = {
    "ranked": ("skips", 1, 1000),
    "dicache": ("rel_l1_thresh", 0.003, 3.0),
    "fbcache": ("rel_l1_thresh", 0.003, 3.0),
    "seacache": ("threshold", 0.003, 3.0),
    "teacache": ("rel_l1_thresh", 0.003, 3.0),
}
TRIALS = 7  # a policy: halves the range of log(threshold) so often
CONFIDENCE = 1.64  # standard errors between the mean that was measured and the one that is relied upon: 95 %
_SOONEST = 4  # videos before a setting is given up

Verdict = Literal["holds", "too far", "slower"]


@dataclass(frozen=True)
class Trial:
    """One setting, measured on some videos.

    `psnr` is the mean in dB against the uncached frames and `low` what it is at least, with 95 % confidence; `blocks`
    the share of the blocks that ran. "slower" computed more than a setting that holds already.
    """

    policy: str
    options: dict[str, Any]
    psnr: float
    low: float
    blocks: float
    verdict: Verdict


class PolicyUnfit(Exception):
    """A policy cannot work on a model: it has to know it, say, and nobody has calibrated it."""


Measure = Callable[[str, Mapping[str, Any]], Iterator[tuple[float, float]]]
"""Makes one video after the other with a policy's options, and tells the PSNR and the share of blocks of each."""


def tune(measure: Measure, psnr: float, policies: Sequence[str] = tuple(TUNABLE)) -> Iterator[Trial]:
    """Every setting that is tried, on the way to the one that computes least while its mean PSNR is at least `psnr`.

    Per policy the threshold is found by halving. PSNR does not fall evenly with it, so a setting counts by what was
    measured of it alone: with 95 % confidence its mean holds on other prompts of the same kind. What cannot hold any
    more, or is slower than what holds already, is given up before all videos are made.
    """
    least = math.inf
    for policy in policies:
        option, lowest, highest = TUNABLE[policy]
        low, high = math.log(lowest), math.log(highest)
        tried = set()
        for _ in range(TRIALS):
            value = _value(option, math.exp((low + high) / 2))
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


def _value(option: str, value: float) -> float | int:
    return round(value) if option in WHOLE else float(f"{value:.3g}")


def _try(measure: Measure, policy: str, options: dict[str, Any], psnr: float, least: float) -> Trial:
    psnrs: list[float] = []
    shares: list[float] = []
    verdict: Verdict = "holds"
    for figure, share in measure(policy, options):
        psnrs.append(figure)
        shares.append(share)
        mean, error = statistics.mean(psnrs), _standard_error(psnrs)
        if len(psnrs) >= _SOONEST and mean + CONFIDENCE * error < psnr:
            verdict = "too far"
            break
        if len(psnrs) >= _SOONEST and statistics.mean(shares) >= least:
            verdict = "slower"
            break
    low = mean - CONFIDENCE * error
    if verdict == "holds" and low < psnr:
        verdict = "too far"
    return Trial(policy, options, mean, low, statistics.mean(shares), verdict)


def _standard_error(figures: Sequence[float]) -> float:
    """Of the mean; of a single figure nothing is known."""
    return statistics.stdev(figures) / math.sqrt(len(figures)) if len(figures) > 1 else math.inf


def best(trials: Sequence[Trial]) -> Trial | None:
    """The one that computed least of those that hold; None where none does."""
    good = [trial for trial in trials if trial.verdict == "holds"]
    return min(good, key=lambda trial: (trial.blocks, -trial.psnr), default=None)


class Videos:
    """Measures settings on `prompts`, `seeds` videos of each, with seeds from `seed` on; `call` are the pipeline's
    other arguments. A `Measure`.
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
        """PSNR in dB and share of computed blocks of one video after the other.

        Raises PolicyUnfit.
        """
        for index, reference in enumerate(self._reference):
            try:
                cache = self.pipe.enable_cache(policy, self.call["num_inference_steps"], **options)
            except (ValueError, TypeError) as error:
                raise PolicyUnfit(str(error)) from error
            try:
                measured = psnr_of(self._frames(index), reference), blocks_share(cache)
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


def psnr_of(frames: Tensor, reference: Tensor) -> float:
    """Of frames in [0, 1], in dB; at most 100."""
    error = (frames.float() - reference.float()).square().mean().item()
    return min(100.0, -10 * math.log10(max(error, 1e-10)))


def blocks_share(cache: Cache) -> float:
    """Blocks that ran in the last call, probes included, by all that would have."""
    size = {(name, unit.index): unit.last - unit.first + 1 for name, e in cache.experts.items() for unit in e.units}
    total = sum(size[d.expert, d.unit] for d in cache.record)
    probe = int(cache.policy.needs_first_block_probe)
    ran = sum(size[d.expert, d.unit] if d.decision == "compute" else probe for d in cache.record)
    return ran / total
