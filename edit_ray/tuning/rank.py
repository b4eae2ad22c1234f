"""Finding the forwards of a model's loop that it misses least, by leaving them out one after the other."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edit_ray.engine.caching import loop_steps
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.engine.segment import MAX_SEQUENCE_LENGTH

Slot = tuple[str, int]
"""A forward of the loop: whose it is, such as "transformer/cond", and its step."""
MOST_SKIPPED = 2 / 3  # of all forwards


@dataclass(frozen=True)
class Round:
    """All skips so far, in the order of their ranks, and how alike the latents are with them, in dB."""

    skipped: tuple[Slot, ...]
    likeness: float


def rank_skips(measure: Callable[[Collection[Slot]], float], slots: Sequence[Slot], most: int) -> Iterator[Round]:
    """Leave out forwards until `most` of them are skipped, always the one after which the rest stays most alike.

    `measure(skipped)` gives the likeness in dB. As skipping more hardly makes it better, what a forward was measured at
    on top of fewer skips is the most that it can reach now: one that is still best when measured anew is the best, and
    most of the others need not be.

    Source: M. Minoux, "Accelerated greedy algorithms for maximizing submodular set functions" (1978).
    """
    skipped: list[Slot] = []
    waiting = [(-math.inf, index, -1) for index in range(len(slots))]  # what is best known comes first
    while waiting and len(skipped) < most:
        bound, index, measured_at = heapq.heappop(waiting)
        if measured_at == len(skipped):
            skipped.append(slots[index])
            yield Round(tuple(skipped), -bound)
        else:
            heapq.heappush(waiting, (-measure([*skipped, slots[index]]), index, len(skipped)))


class SkipMeasure:
    """How alike a pipeline's latents stay to its uncached ones when it skips some forwards.

    Prompts go `batch_size` at a time, which changes no decision as the skips are known beforehand; seeds count from
    `seed`; `call` are the pipeline's other arguments.
    """

    def __init__(
        self,
        pipe: EditWanPipeline,
        prompts: Sequence[str],
        seed: int,
        call: Mapping[str, Any],
        batch_size: int = 1,
    ) -> None:
        self.pipe, self.call = pipe, {key: value for key, value in call.items() if key != "negative_prompt"}
        self.num_steps = int(call["num_inference_steps"])
        self.branches = ("cond", "uncond") if call["guidance_scale"] > 1 else ("cond",)
        self._seeds = [
            list(range(seed + start, seed + min(start + batch_size, len(prompts))))
            for start in range(0, len(prompts), batch_size)
        ]
        self._embeds = [
            self._encode(prompts[seeds[0] - seed : seeds[-1] + 1 - seed], call.get("negative_prompt") or "")
            for seeds in self._seeds
        ]
        self._reference = [self._latents(index) for index in range(len(self._seeds))]

    def slots(self) -> list[Slot]:
        """The forwards that can be skipped: all but the first of each expert, which have nothing to reuse."""
        experts = self._experts()
        later = [step for step, expert in enumerate(experts) if expert in experts[:step]]
        return [(f"{experts[step]}/{branch}", step) for step in later for branch in self.branches]

    def owners(self) -> list[str]:
        """All that have forwards: per expert "transformer/cond" and, with guidance, "transformer/uncond"."""
        return [f"{expert}/{branch}" for expert in dict.fromkeys(self._experts()) for branch in self.branches]

    def _experts(self) -> list[str]:
        """Which expert each step is of."""
        self.pipe.scheduler.set_timesteps(self.num_steps)
        return [step.expert for step in loop_steps(self.pipe, self.pipe.scheduler)]

    def __call__(self, skipped: Collection[Slot]) -> float:
        """Mean over the prompts of the signal-to-noise ratio in dB, for a signal of variance 1; at most 100."""
        masks = {owner: [(owner, step) not in skipped for step in range(self.num_steps)] for owner in self.owners()}
        self.pipe.enable_cache("schedule", self.num_steps, mask=masks)
        try:
            errors = [
                (self._latents(index) - reference).square().flatten(1).mean(1)
                for index, reference in enumerate(self._reference)
            ]
        finally:
            self.pipe.disable_cache()
        likeness = [min(100.0, -10 * math.log10(max(error, 1e-10))) for error in torch.cat(errors).tolist()]
        return sum(likeness) / len(likeness)

    def _encode(self, prompts: Sequence[str], negative_prompt: str) -> dict[str, Any]:
        guided = len(self.branches) > 1
        embeds, negative = self.pipe.encode_prompt(
            list(prompts),
            negative_prompt,
            guided,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            device=self.pipe._execution_device,
        )
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative if guided else None}

    def _latents(self, index: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in self._seeds[index]]
        latents: Tensor = self.pipe(
            **self._embeds[index], **self.call, generator=generators, output_type="latent", return_dict=False
        )[0]
        return latents.float()
