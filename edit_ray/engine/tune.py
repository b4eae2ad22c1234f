"""Finding, on the user's own model and prompts, the policy that computes least and keeps the frames close enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_ray.cache.controller import Cache
from edit_ray.engine.pipeline import EditWanPipeline

# Each with the option that makes it skip more as it rises, and the range in which that is looked for.
TUNABLE: dict[str, tuple[str, float, float]] = {
    "teacache": ("rel_l1_thresh", 0.003, 3.0),
    "fbcache": ("rel_l1_thresh", 0.003, 3.0),
    "seacache": ("threshold", 0.003, 3.0),
    "dicache": ("rel_l1_thresh", 0.003, 3.0),
}
TRIALS = 7  # a policy: halves the range of log(threshold) so often


@dataclass(frozen=True)
class Trial:
    """One setting, measured: PSNR in dB against the uncached frames, share of the blocks that it computed."""

    policy: str
    options: dict[str, Any]
    psnr: float
    blocks: float


class Tuner:
    """Measures settings on `prompts`, with seeds from `seed` on; `call` are the pipeline's other arguments."""

    def __init__(self, pipe: EditWanPipeline, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> None:
        self.pipe, self.prompts, self.seed, self.call = pipe, prompts, seed, dict(call)
        self._reference = [self._frames(index) for index in range(len(prompts))]

    def measure(self, policy: str, options: Mapping[str, Any]) -> Trial:
        """Mean PSNR and share of computed blocks of one setting, over all prompts."""
        cache = self.pipe.enable_cache(policy, self.call["num_inference_steps"], **options)
        psnrs, shares = [], []
        try:
            for index, reference in enumerate(self._reference):
                psnrs.append(psnr(self._frames(index), reference))
                shares.append(blocks_share(cache))
        finally:
            self.pipe.disable_cache()
        return Trial(policy, dict(options), sum(psnrs) / len(psnrs), sum(shares) / len(shares))

    def _frames(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + index)
        video = self.pipe(self.prompts[index], generator=generator, output_type="pt", **self.call)[0]
        frames: Tensor = video.cpu()
        return frames


def tune(measure: Callable[[str, Mapping[str, Any]], Trial], psnr_at_least: float) -> Iterator[Trial]:
    """Every setting that is tried on the way to each policy's highest threshold at which the PSNR still holds."""
    for policy, (option, lowest, highest) in TUNABLE.items():
        low, high = math.log(lowest), math.log(highest)
        for _ in range(TRIALS):
            middle = (low + high) / 2
            try:
                trial = measure(policy, {option: float(f"{math.exp(middle):.3g}")})
            except ValueError:  # teacache on a model that nobody has calibrated
                break
            yield trial
            low, high = (middle, high) if trial.psnr >= psnr_at_least else (low, middle)


def best(trials: Sequence[Trial], psnr_at_least: float) -> Trial | None:
    """The one that computed least of those whose PSNR holds; None where none does."""
    good = [trial for trial in trials if trial.psnr >= psnr_at_least]
    return min(good, key=lambda trial: (trial.blocks, -trial.psnr), default=None)


def psnr(frames: Tensor, reference: Tensor) -> float:
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
