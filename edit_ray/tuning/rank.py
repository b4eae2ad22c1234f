"""Ranks the forwards of a model's loop by how little the latents lose when they are skipped, and measures reuse."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_ray.engine.conditioning import StepSchedule
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.segment import MAX_SEQUENCE_LENGTH
from edit_ray.tuning.likeness import psnr
from edit_ray.tuning.search import Loop, Setting

Slot = tuple[str, int]
"""A forward of the loop: its branch of an expert, such as "transformer/cond", and its step."""
MOST_SKIPPED = 2 / 3  # of all forwards
LONGEST_REUSE = 8  # steps in a row, which bounds the number of measurements


@dataclass(frozen=True)
class Round:
    """All skips so far, in the order of their ranks, and the likeness of the latents with them, in dB."""

    skipped: tuple[Slot, ...]
    likeness: float


def rank_skips(measure: Callable[[Collection[Slot]], float], slots: Sequence[Slot], most: int) -> Iterator[Round]:
    """Skip forwards until `most` of them are skipped, always the one that leaves the highest likeness.

    `measure(skipped)` gives the likeness in dB. As skipping more hardly raises it, a forward's likeness on top of fewer
    skips is its upper bound now: one that is still best when measured again is the best, and most others need not be.

    Source: M. Minoux, "Accelerated greedy algorithms for maximizing submodular set functions" (1978).
    """
    skipped: list[Slot] = []
    waiting = [(-math.inf, index, -1) for index in range(len(slots))]  # the highest bound first
    while waiting and len(skipped) < most:
        bound, index, measured_at = heapq.heappop(waiting)
        if measured_at == len(skipped):
            skipped.append(slots[index])
            yield Round(tuple(skipped), -bound)
        else:
            heapq.heappush(waiting, (-measure([*skipped, slots[index]]), index, len(skipped)))


def loop_of(pipe: EditWanPipeline, call: Mapping[str, Any]) -> Loop:
    """The loop that a pipeline makes with these arguments of a call."""
    planned = pipe.planned_steps(StepSchedule(int(call["num_inference_steps"]), call.get("sigmas")))
    branches = ("cond", "uncond") if call["guidance_scale"] > 1 else ("cond",)
    return Loop(tuple(step.expert for step in planned), branches, len(pipe.denoiser.blocks))


class SkipMeasure:
    """Measures the likeness of a pipeline's latents to its uncached ones when it skips some forwards.

    Prompts run `batch_size` at a time, which changes no decision as the skips are known beforehand; seeds count from
    `seed`; `call` has the pipeline's other arguments.
    """

    def __init__(
        self, pipe: EditWanPipeline, prompts: Sequence[str], seed: int, call: Mapping[str, Any], batch_size: int = 1
    ) -> None:
        self.pipe, self.call = pipe, {key: value for key, value in call.items() if key != "negative_prompt"}
        self.num_steps = int(call["num_inference_steps"])
        self.loop = loop_of(pipe, call)
        self.branches, self._experts, guided = self.loop.branches, self.loop.experts, "uncond" in self.loop.branches
        self._batches: list[tuple[range, dict[str, Any]]] = []  # seeds, embeddings
        options = {"max_sequence_length": MAX_SEQUENCE_LENGTH, "device": pipe._execution_device}
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            embeds, negative = pipe.encode_prompt(texts, call.get("negative_prompt") or "", guided, **options)
            seeds = range(seed + start, seed + start + len(texts))
            self._batches.append((seeds, {"prompt_embeds": embeds, "negative_prompt_embeds": negative}))
        self._reference = self._latents()

    def slots(self) -> list[Slot]:
        """The forwards that can be skipped: all but the first of each expert, which have nothing to reuse."""
        return [(owner, step) for owner, _, step in Setting(self.loop).places]

    def owners(self) -> list[str]:
        """All that have forwards: per expert "transformer/cond" and, with guidance, "transformer/uncond"."""
        return [f"{expert}/{branch}" for expert in dict.fromkeys(self._experts) for branch in self.branches]

    def __call__(self, skipped: Collection[Slot]) -> float:
        """Mean over the prompts of the signal-to-noise ratio in dB, for a signal of variance 1; at most 100."""
        latents = self._latents_without(skipped)
        return sum(map(psnr, latents, self._reference)) / len(latents)

    def error(self, skipped: Collection[Slot]) -> float:
        """Mean over the prompts of the mean absolute difference."""
        latents = self._latents_without(skipped)
        pairs = zip(latents, self._reference, strict=True)
        return sum((made - reference).abs().mean().item() for made, reference in pairs) / len(latents)

    def reuses(self) -> list[tuple[int, int]]:
        """Each step and the number of steps after it that may reuse its residual, up to `LONGEST_REUSE`."""
        return self.loop.reuses(LONGEST_REUSE)

    def reused(self, step: int, count: int) -> list[Slot]:
        """The forwards of a reuse."""
        return [(owner, at) for owner, _, at in self.loop.reusing(step, count).skips]

    def _latents_without(self, skipped: Collection[Slot]) -> list[Tensor]:
        masks = {owner: [(owner, step) not in skipped for step in range(self.num_steps)] for owner in self.owners()}
        self.pipe.enable_cache("schedule", self.num_steps, sigmas=self.call.get("sigmas"), mask=masks)
        try:
            return self._latents()
        finally:
            self.pipe.disable_cache()

    def _latents(self) -> list[Tensor]:
        """The latents [C, T, h, w] of each prompt."""
        latents: list[Tensor] = []
        for seeds, embeds in self._batches:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            call: dict[str, Any] = {**embeds, **self.call, "output_type": "latent", "return_dict": False}
            latents.extend(self.pipe(**call, generator=generators)[0])
        return latents
