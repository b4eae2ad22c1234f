"""Searches what a loop skips: masks, what stands in for each skip, units and the CFG gate together.

The effect on the result is measured, one setting after the other: a local search from a given start, which takes each
change that skips more and stays above a floor, or skips as much and is more alike. Where no change of whole stacks is
left, they are split into units. Its start is the path of LeMiCa (arXiv 2511.00090).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from edit_ray.cache.cfg_gate import gated_steps
from edit_ray.cache.policies.lemica import minimax_path

Place = tuple[str, int, int]
"""A unit's step: its owner, such as "transformer/cond", the unit and the step."""
FORECASTS = ("linear", "spectrum", "dmd")  # beside reuse
MOST_UNITS = 4  # each has residuals of its own to store
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Loop:
    """The expert of each step, the branches that each step computes, and the blocks of an expert."""

    experts: tuple[str, ...]
    branches: tuple[str, ...]
    blocks: int

    def later_steps(self) -> list[int]:
        """All but the first of each expert, which has nothing to reuse."""
        return [step for step, expert in enumerate(self.experts) if expert in self.experts[:step]]

    def reuses(self, longest: int) -> list[tuple[int, int]]:
        """Each step and the number of steps after it that may reuse its residual, up to `longest`.

        They are of the step's expert, and the last step of the loop is none of them.
        """
        last = len(self.experts) - 1
        return [
            (step, count)
            for step, expert in enumerate(self.experts)
            for count in range(1, min(longest, last - 1 - step) + 1)
            if self.experts[step + count] == expert
        ]

    def reusing(self, step: int, count: int) -> Setting:
        """Only `count` steps after a step reuse its residual, in all branches."""
        steps = range(step + 1, step + 1 + count)
        places = [(f"{self.experts[at]}/{branch}", 0, at) for at in steps for branch in self.branches]
        return Setting(self, dict.fromkeys(places, "reuse"))

    def share(self, gate: int) -> float:
        """`cfg_gate` for a gate at a step: half a step before it, so that no rounding moves it."""
        return round(max(0.0, gate - 0.5) / len(self.experts), 6)

    def gated(self, gate: int | None) -> list[bool]:
        """Whether each step leaves "uncond" out if the first of them is `gate`; None for no such step."""
        return gated_steps(1 if gate is None else self.share(gate), self.experts)


@dataclass(frozen=True)
class Setting:
    """What a loop skips: places with their forecasts, in `units` units of equal size; "uncond" from `gate` on."""

    loop: Loop
    skips: Mapping[Place, str] = field(default_factory=dict)
    units: int = 1
    gate: int | None = None

    @property
    def blocks(self) -> float:
        """The share of all blocks that is computed."""
        loop = self.loop
        forwards = len(loop.experts) * len(loop.branches)
        return (forwards - sum(loop.gated(self.gate)) - len(self.skips) / self.units) / forwards

    @property
    def places(self) -> list[Place]:
        """All that can be skipped, without what the gate leaves out."""
        loop, gated = self.loop, self.loop.gated(self.gate)
        return [
            (f"{loop.experts[step]}/{branch}", unit, step)
            for step in loop.later_steps()
            for branch in loop.branches
            if not (branch == "uncond" and gated[step])
            for unit in range(self.units)
        ]

    def options(self) -> dict[str, Any]:
        """As arguments of `enable_cache` for the policy `schedule`."""
        loop, steps = self.loop, len(self.loop.experts)
        masks: dict[str, list[int]] = {}
        forecasts: dict[str, list[str]] = {}
        for expert in dict.fromkeys(loop.experts):
            for branch in loop.branches:
                for unit in range(self.units):
                    owner = f"{expert}/{branch}"
                    key = owner if self.units == 1 else f"{owner}/{unit}"
                    masks[key] = [int((owner, unit, step) not in self.skips) for step in range(steps)]
                    forecasts[key] = [self.skips.get((owner, unit, step), "reuse") for step in range(steps)]
        options: dict[str, Any] = {"mask": masks}
        if set(self.skips.values()) - {"reuse"}:
            options["forecast"] = forecasts
        if self.units > 1:
            size = loop.blocks // self.units
            options["granularity"] = "per_block" if size == 1 else size
        if self.gate is not None:
            options["cfg_gate"] = loop.share(self.gate)
        return options

    def skipping(self, place: Place, forecast: str = "reuse") -> Setting:
        """With one more skip, or another forecast for it."""
        return replace(self, skips={**self.skips, place: forecast})

    def computing(self, place: Place) -> Setting:
        """With one skip less."""
        return replace(self, skips={at: forecast for at, forecast in self.skips.items() if at != place})

    def gated_from(self, gate: int) -> Setting:
        """With the CFG gate at a step."""
        made = replace(self, gate=gate, skips={})
        return replace(made, skips={at: self.skips[at] for at in made.places if at in self.skips})

    def split(self) -> Setting | None:
        """The same skips in twice as many units; None where the blocks cannot be halved again."""
        units = 2 * self.units
        if units > MOST_UNITS or self.loop.blocks % units:
            return None
        halves = {(of, 2 * unit + n, step): how for (of, unit, step), how in self.skips.items() for n in (0, 1)}
        return replace(self, skips=halves, units=units)


def lemica_setting(loop: Loop, reuse_error: Sequence[Sequence[float]], skips: int, forecast: str = "reuse") -> Setting:
    """LeMiCa's path: its steps are skipped by all branches, as far as each expert has begun."""
    computed = set(minimax_path(reuse_error, skips))
    return Setting(loop, {place: forecast for place in Setting(loop).places if place[2] not in computed})


def changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """All neighbours of a setting, with a name for the change: fewer blocks, or as many."""
    if "uncond" in setting.loop.branches:
        gate = len(setting.loop.experts) if setting.gate is None else setting.gate
        for earlier in range(gate - 1, 0, -1):
            gated = setting.gated_from(earlier)
            yield f"gate {earlier}", gated
            if gated.blocks < setting.blocks:
                break
    free = [place for place in setting.places if place not in setting.skips]
    for place in free:
        yield f"skip {place}", setting.skipping(place)
    for place, how in setting.skips.items():
        owner, unit, step = place
        for forecast in ("reuse", *FORECASTS):
            if forecast != how:
                yield f"{forecast} {place}", setting.skipping(place, forecast)
        expert, _, branch = owner.partition("/")
        other = {"cond": "uncond", "uncond": "cond"}[branch]
        near = [(owner, unit, step - 1), (owner, unit, step + 1), (f"{expert}/{other}", unit, step)]
        for to in near:
            if to in free:
                yield f"move {place} {to}", setting.computing(place).skipping(to, how)


@dataclass(frozen=True)
class Found:
    """A setting that the search has accepted, with the PSNR of each video and what that is relied upon for."""

    setting: Setting
    psnr: tuple[float, ...]
    low: float
    videos: int  # measured so far, by the whole search


def search(
    start: Setting,
    measure: Callable[[Setting, Sequence[float]], Sequence[float]],
    least: Callable[[Sequence[float]], float],
    floor: float,
    videos: int,
    budget: int,
    seed: int = 0,
) -> Iterator[Found]:
    """The start if it holds, and each setting that is better than the one before, until `budget` videos are made.

    Args:
        measure: Makes the videos of a setting, and gives the PSNR of each; fewer where it gives up because it is below
            what is needed, for each video.
        least: What PSNRs of all videos are relied upon for.
        floor: A setting holds if `least` is at least this.
        videos: How many a setting is measured on.
        seed: Of the order in which changes are tried. Those tried before come last, the best of them first.
    """
    order, made = random.Random(seed), 0
    losses: dict[str, float] = {}  # by change, when it was last tried

    def low_of(setting: Setting, needed: Sequence[float]) -> tuple[tuple[float, ...], float]:
        nonlocal made
        psnrs = tuple(measure(setting, needed))
        made += len(psnrs)
        return psnrs, least(psnrs) if len(psnrs) == videos else float("-inf")

    psnrs, low = low_of(start, [floor] * videos)
    if low < floor:
        return
    now = start
    yield Found(now, psnrs, low, made)
    while True:
        for name, changed in _in_turns(now, order, losses):
            if made + videos > budget:
                return
            fewer = changed.blocks < now.blocks - _ROUNDING
            found, reached = low_of(changed, [floor] * videos if fewer else psnrs)
            losses.pop(name, None)
            if reached >= floor if fewer else reached > low:
                now, psnrs, low = changed, found, reached
                yield Found(now, psnrs, low, made)
                break
            losses[name] = sum(psnrs[: len(found)]) / len(found) - sum(found) / len(found)
        else:
            halves, losses = now.split(), {}
            if halves is None or made + videos > budget:
                return
            now = halves
            psnrs, low = low_of(now, [floor] * videos)
            if low < floor:  # a forecast of halves may be another one
                return


def _in_turns(now: Setting, order: random.Random, losses: Mapping[str, float]) -> Iterator[tuple[str, Setting]]:
    """The changes that skip more and those that skip as much, taking turns."""
    tries = list(changes(now))
    order.shuffle(tries)
    tries.sort(key=lambda each: losses.get(each[0], float("-inf")))
    kinds: tuple[list[tuple[str, Setting]], list[tuple[str, Setting]]] = [], []
    for each in tries:
        kinds[each[1].blocks > now.blocks - _ROUNDING].append(each)
    for pair in zip_longest(*kinds):
        yield from (each for each in pair if each is not None)
