"""Which residuals a cache has stored, and how a unit reads those of earlier steps and of earlier generations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_ray.cache.policies.policy import UnitState
from edit_ray.cache.stores.store import CacheStore, Key

UnitId = tuple[str, str, int]  # expert, branch, unit
Layout = tuple[torch.Size, torch.dtype]  # of the latents that a residual was computed from, batch included


@dataclass(frozen=True)
class StoredResidual:
    """One stored residual, under `key` (generation, expert, branch, unit, step)."""

    key: Key
    tier: str
    shape: tuple[int, ...]
    bytes: int


class ResidualIndex:
    """Puts residuals into a store, and knows what was put there: a store may let anything go at any time.

    The branches of a step may be computed in two threads; the store is asked by one at a time.
    """

    def __init__(self, store: CacheStore, history_len: int) -> None:
        self.store, self.history_len = store, history_len
        self._asking = threading.Lock()
        self.generation = 0
        self.window: tuple[int, ...] = ()
        self._steps: dict[tuple[int, UnitId], list[int]] = {}
        self._layouts: dict[tuple[int, UnitId], Layout | None] = {}
        self._entries: dict[Key, StoredResidual] = {}

    def put(
        self, state: UnitState, step: int, residual: Tensor, keeps: Callable[[int], bool], layout: Layout | None = None
    ) -> None:
        """Store the residual of a computed step, and drop the oldest that nothing will read."""
        owner = (state.expert, state.branch, state.unit_index)
        key = (self.generation, *owner, step)
        with self._asking:
            self.store.put(key, residual)
        self._entries[key] = StoredResidual(key, "", tuple(residual.shape), residual.nbytes)
        self._layouts[self.generation, owner] = layout
        steps = self._steps.setdefault((self.generation, owner), [])
        steps.append(step)
        if len(steps) > self.history_len and not keeps(steps[-1 - self.history_len]):
            self._drop((self.generation, *owner, steps[-1 - self.history_len]))

    def get(self, key: Key) -> Tensor | None:
        """What the store has under the key."""
        with self._asking:
            return self.store.get(key)

    def adopt(self, store: CacheStore, stored: Iterable[Key]) -> None:
        """Go on with another store, and with what earlier generations have left there, each in the order of steps."""
        self.store = store
        self._steps, self._layouts, self._entries = {}, {}, {}
        for generation, expert, branch, unit, step in stored:
            owner = (str(expert), str(branch), int(unit or 0))
            self._steps.setdefault((int(generation or 0), owner), []).append(int(step or 0))

    def entries(self) -> list[StoredResidual]:
        """What is stored now, with the tier that holds it."""
        located = [(entry, self._tier_of(entry.key)) for entry in self._entries.values()]
        return [
            StoredResidual(entry.key, tier, entry.shape, entry.bytes) for entry, tier in located if tier is not None
        ]

    def _tier_of(self, key: Key) -> str | None:
        """Of a store that can tell; of any other its only tier, if reading finds the entry."""
        if hasattr(self.store, "tier_of"):
            found: str | None = self.store.tier_of(key)
            return found
        tier: str = getattr(self.store, "tier", type(self.store).__name__)
        return None if self.get(key) is None else tier

    def bytes_by_branch(self) -> dict[str, int]:
        """Bytes put and not dropped, by branch."""
        total: dict[str, int] = {}
        for entry in self._entries.values():
            branch = str(entry.key[2])
            total[branch] = total.get(branch, 0) + entry.bytes
        return total

    def steps(self, generation: int, owner: UnitId) -> list[int]:
        """The steps that a unit has computed in a generation."""
        return self._steps.get((generation, owner), [])

    def fits(self, generation: int, owner: UnitId, layout: Layout | None) -> bool:
        """Whether what a unit has stored is for latents of this layout; so is what is not known."""
        stored = self._layouts.get((generation, owner))
        return stored is None or layout is None or stored == layout

    def window_keys(self, keeps: Callable[[int], bool]) -> list[Key]:
        """What the reuse window can be asked for, in the order of use: by step, then by unit."""
        keys = [
            (generation, *owner, step)
            for (generation, owner), steps in self._steps.items()
            if generation in self.window
            for step in steps
            if keeps(step) and (generation, *owner, step) in self._entries
        ]
        return sorted(keys, key=lambda key: (key[-1], key[3], key[1:3], key[0]))

    def set_window(self, generations: Iterable[int]) -> None:
        """Read from these generations; those before all of them are dropped, as windows only move on."""
        self.window = tuple(sorted({int(generation) for generation in generations}))
        oldest = min(self.window, default=self.generation)
        for generation in {generation for generation, _ in self._steps}:
            if generation < oldest and generation != self.generation:
                self.forget(generation)

    def forget(self, generation: int) -> None:
        """Drop all that a generation stored."""
        for key in [key for key in self._entries if key[0] == generation]:
            self._drop(key)
        self._steps = {which: steps for which, steps in self._steps.items() if which[0] != generation}
        self._layouts = {which: layout for which, layout in self._layouts.items() if which[0] != generation}

    def clear(self) -> None:
        """Drop everything that was put here; what others keep in the same store stays."""
        for key in list(self._entries):
            self._drop(key)
        self._steps.clear()
        self._layouts.clear()

    def _drop(self, key: Key) -> None:
        with self._asking:
            self.store.drop(key)
        self._entries.pop(key, None)


@dataclass(frozen=True)
class UnitResiduals:
    """The residuals that one unit may read; implements `policies.Residuals`."""

    index: ResidualIndex
    owner: UnitId
    device: torch.device | None = None
    layout: Layout | None = None

    def latest(self) -> Tensor | None:
        """See `Residuals`."""
        steps = self.index.steps(self.index.generation, self.owner)
        return self._get(self.index.generation, steps[-1]) if steps else None

    def history(self) -> list[tuple[int, Tensor]]:
        """See `Residuals`."""
        steps = self.index.steps(self.index.generation, self.owner)
        newest = reversed(steps[-self.index.history_len :])
        read = [(step, self._get(self.index.generation, step)) for step in newest]
        return [(step, residual) for step, residual in read if residual is not None]

    def window_steps(self, step: int | None) -> int:
        """See `Residuals`."""
        return len(self._window(step))

    def window(self, step: int | None) -> list[Tensor]:
        """See `Residuals`."""
        read = [self._get(generation, at) for generation, at in self._window(step)]
        return [residual for residual in read if residual is not None]

    def _window(self, step: int | None) -> list[tuple[int, int]]:
        """(generation, step) of what was computed in the window; without `step`, each generation's last."""
        found = []
        for generation in self.index.window:
            steps = self.index.steps(generation, self.owner)
            if steps and (step is None or step in steps) and self.index.fits(generation, self.owner, self.layout):
                found.append((generation, steps[-1] if step is None else step))
        return found

    def _get(self, generation: int, step: int) -> Tensor | None:
        residual = self.index.get((generation, *self.owner, step))
        return residual if residual is None or self.device is None else residual.to(self.device)
