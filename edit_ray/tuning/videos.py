"""Makes the user's videos under a policy, and compares them with the uncached ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from edit_ray.cache.cache import Cache
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.tuning.journal import Journal
from edit_ray.tuning.likeness import Likeness, likeness, psnr


class PolicyUnfit(Exception):
    """A policy cannot run on this model, for example because it needs a calibration."""


Measure = Callable[[str, Mapping[str, Any]], Iterator[tuple[Likeness, float]]]
"""Makes one video after the other with a policy's options, and yields the likeness and the share of blocks of each."""


class Videos:
    """A `Measure` on `prompts`, `seeds` videos of each, with seeds from `seed` on.

    `call` has the pipeline's other arguments. What the journal knows is not made again; `made` counts the videos.
    """

    def __init__(
        self,
        pipe: EditWanPipeline,
        prompts: Sequence[str],
        seed: int,
        call: Mapping[str, Any],
        seeds: int = 1,
        journal: Journal | None = None,
    ) -> None:
        self.pipe, self.call, self.seeds, self.made = pipe, dict(call), seeds, 0
        self._journal = Journal(None, {}) if journal is None else journal
        self._samples = [
            (prompt, seed + index * seeds + nth) for index, prompt in enumerate(prompts) for nth in range(seeds)
        ]
        self._references: dict[tuple[int, str], Tensor] = {}

    def __call__(
        self, policy: str, options: Mapping[str, Any], only: Sequence[int] | None = None
    ) -> Iterator[tuple[Likeness, float]]:
        """Likeness and share of computed blocks, video by video; of some videos, by their indices.

        Raises PolicyUnfit.
        """
        for *figures, share in self._measured(policy, options, range(len(self)) if only is None else only, "pt"):
            yield Likeness(*figures), share

    def latents(self, policy: str, options: Mapping[str, Any], only: Sequence[int]) -> Iterator[float]:
        """The likeness of the final latents in dB, for a signal of variance 1, which needs no decoding.

        Raises PolicyUnfit.
        """
        for (found,) in self._measured(policy, options, only, "latent"):
            yield found

    def __len__(self) -> int:
        return len(self._samples)

    def _measured(
        self, policy: str, options: Mapping[str, Any], only: Sequence[int], output_type: str
    ) -> Iterator[list[float]]:
        name = json.dumps([output_type, policy, dict(options)], sort_keys=True)
        for index in only:
            found = self._journal.get(name, index)
            if found is None:
                found = self._measure(policy, options, index, output_type)
                self._journal.put(name, index, found)
            yield found

    def _measure(self, policy: str, options: Mapping[str, Any], index: int, output_type: str) -> list[float]:
        if (index, output_type) not in self._references:
            self._references[index, output_type] = self._make(index, output_type)
        reference, steps = self._references[index, output_type], self.call["num_inference_steps"]
        try:
            cache = self.pipe.enable_cache(policy, steps, sigmas=self.call.get("sigmas"), **options)
            cache.policy.check(cache.num_steps)  # a calibration may be of another number of steps
        except (ValueError, TypeError) as error:
            self.pipe.disable_cache()
            raise PolicyUnfit(str(error)) from error
        try:
            made = self._make(index, output_type)
            if output_type == "latent":
                return [psnr(made, reference)]
            return [*astuple(likeness(made, reference)), blocks_share(cache)]
        finally:
            self.pipe.disable_cache()

    def _make(self, index: int, output_type: str) -> Tensor:
        """Frames [F, 3, H, W] in [0, 1] with "pt", latents [C, T, h, w] with "latent"."""
        prompt, seed = self._samples[index]
        generator = torch.Generator().manual_seed(seed)
        video = self.pipe(prompt, generator=generator, output_type=output_type, return_dict=False, **self.call)[0]
        self.made += 1
        made: Tensor = video[0].cpu()
        return made


def blocks_share(cache: Cache) -> float:
    """Blocks that ran in the last call, probes included, over those of an uncached one."""
    size = {(name, unit.index): unit.last - unit.first + 1 for name, e in cache.experts.items() for unit in e.units}
    total = sum(size[d.expert, d.unit] for d in cache.record)
    probe = int(cache.policy.needs_first_block_probe)
    entered = [d for d in cache.record if d.reason != "gate"]
    ran = sum(size[d.expert, d.unit] if d.decision == "compute" else probe for d in entered)
    return ran / total
