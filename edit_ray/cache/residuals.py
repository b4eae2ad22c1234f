"""The stored residuals of a cache, which units read, and the hooks that edit a unit's current one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edit_ray.cache.policies.policy import PolicyContext, UnitState
from edit_ray.cache.stores.base import CacheStore
from edit_ray.tiers.reuse_plan import Key

UnitId = tuple[str, str, int]  # expert, branch, unit
Layout = tuple[torch.Size, torch.dtype]  # of the latents that a residual was computed from, batch included

Edit = Callable[[Tensor], Tensor]
UnitHook = Callable[[PolicyContext], str | Tensor | Edit | None]


@dataclass(frozen=True)
class StoredResidual:
    """One stored residual, under `key` (generation, expert, branch, unit, step)."""

    key: Key
    tier: str
    shape: tuple[int, ...]
    bytes: int


class ResidualIndex:
    """Puts residuals into a store and records which: a store may evict anything at any time.

    The branches of a step may be computed in two threads; only one at a time calls the store.
    """

    def __init__(self, store: CacheStore, history_len: int) -> None:
        self.store, self.history_len = store, history_len
        self.generation = 0
        self.window: tuple[int, ...] = ()
        self._store_lock = threading.Lock()
        self._steps: dict[tuple[int, UnitId], list[int]] = {}
        self._layouts: dict[tuple[int, UnitId], Layout | None] = {}
        self._entries: dict[Key, StoredResidual] = {}

    def put(
        self, state: UnitState, step: int, residual: Tensor, keeps: Callable[[int], bool], layout: Layout | None = None
    ) -> None:
        """Store the residual of a computed step, and drop the oldest that nothing will read."""
        unit = (state.expert, state.branch, state.unit_index)
        key = (self.generation, *unit, step)
        with self._store_lock:
            self.store.put(key, residual)
        self._entries[key] = StoredResidual(key, "", tuple(residual.shape), residual.nbytes)
        self._layouts[self.generation, unit] = layout
        steps = self._steps.setdefault((self.generation, unit), [])
        steps.append(step)
        if len(steps) > self.history_len and not keeps(steps[-1 - self.history_len]):
            self._drop((self.generation, *unit, steps[-1 - self.history_len]))

    def get(self, key: Key) -> Tensor | None:
        """The residual of a key, None if the store has evicted it."""
        with self._store_lock:
            return self.store.get(key)

    def adopt(self, store: CacheStore, stored: Iterable[Key]) -> None:
        """Use another store from now on. Earlier generations have `stored` residuals there, in the order of steps."""
        self.store = store
        self._steps, self._layouts, self._entries = {}, {}, {}
        for generation, expert, branch, unit, step in stored:
            unit_id = (str(expert), str(branch), int(unit or 0))
            self._steps.setdefault((int(generation or 0), unit_id), []).append(int(step or 0))

    def entries(self) -> list[StoredResidual]:
        """Every stored residual, with the tier that holds it."""
        located = [(entry, self._tier_of(entry.key)) for entry in list(self._entries.values())]
        return [replace(entry, tier=tier) for entry, tier in located if tier is not None]

    def _tier_of(self, key: Key) -> str | None:
        """The store's `tier_of`; a store without one has a single tier, and is read to find the entry."""
        if hasattr(self.store, "tier_of"):
            found: str | None = self.store.tier_of(key)
            return found
        tier: str = getattr(self.store, "tier", type(self.store).__name__)
        return None if self.get(key) is None else tier

    def bytes_by_branch(self) -> dict[str, int]:
        """Bytes put and not dropped, by branch."""
        total: dict[str, int] = {}
        for entry in list(self._entries.values()):  # the other branch's thread may store meanwhile
            branch = str(entry.key[2])
            total[branch] = total.get(branch, 0) + entry.bytes
        return total

    def steps(self, generation: int, unit: UnitId) -> list[int]:
        """The steps that a unit has computed in a generation."""
        return self._steps.get((generation, unit), [])

    def fits(self, generation: int, unit: UnitId, layout: Layout | None) -> bool:
        """Whether a unit's stored residuals are for latents of this layout; an unknown layout fits."""
        stored = self._layouts.get((generation, unit))
        return stored is None or layout is None or stored == layout

    def window_keys(self, keeps: Callable[[int], bool]) -> list[Key]:
        """The keys that may be read from the reuse window, in the order of use: by step, then by unit."""
        keys = [
            (generation, *unit, step)
            for (generation, unit), steps in self._steps.items()
            if generation in self.window
            for step in steps
            if keeps(step) and (generation, *unit, step) in self._entries
        ]
        return sorted(keys, key=lambda key: (key[-1], key[3], key[1:3], key[0]))

    def set_window(self, generations: Iterable[int]) -> None:
        """Read from these generations; still earlier ones are dropped, as windows only move forward."""
        self.window = tuple(sorted({int(generation) for generation in generations}))
        oldest = min(self.window, default=self.generation)
        for generation in {generation for generation, _ in self._steps}:
            if generation < oldest and generation != self.generation:
                self.forget(generation)

    def forget(self, generation: int) -> None:
        """Drop every residual of a generation."""
        for key in [key for key in self._entries if key[0] == generation]:
            self._drop(key)
        self._steps = {which: steps for which, steps in self._steps.items() if which[0] != generation}
        self._layouts = {which: layout for which, layout in self._layouts.items() if which[0] != generation}

    def clear(self) -> None:
        """Drop every residual of this index; other entries of the store stay."""
        for key in list(self._entries):
            self._drop(key)
        self._steps.clear()
        self._layouts.clear()

    def _drop(self, key: Key) -> None:
        with self._store_lock:
            self.store.drop(key)
        self._entries.pop(key, None)


@dataclass(frozen=True)
class UnitResiduals:
    """The stored residuals that a unit may read at its step, but not change: they are the store's own tensors."""

    index: ResidualIndex
    unit: UnitId
    device: torch.device | None = None
    layout: Layout | None = None

    def latest(self) -> Tensor | None:
        """The residual of the last computed step."""
        steps = self.index.steps(self.index.generation, self.unit)
        return self._get(self.index.generation, steps[-1]) if steps else None

    def history(self) -> list[tuple[int, Tensor]]:
        """(step, residual) of the last computed steps, newest first, without those that were evicted."""
        newest = reversed(self.index.steps(self.index.generation, self.unit)[-self.index.history_len :])
        read = [(step, self._get(self.index.generation, step)) for step in newest]
        return [(step, residual) for step, residual in read if residual is not None]

    def window_steps(self, step: int | None) -> int:
        """The number of generations in the reuse window that have computed `step` (for None: any step)."""
        return len(self._window(step))

    def window(self, step: int | None) -> list[Tensor]:
        """Their residuals, oldest generation first, without those that were evicted."""
        read = [self._get(generation, at) for generation, at in self._window(step)]
        return [residual for residual in read if residual is not None]

    def _window(self, step: int | None) -> list[tuple[int, int]]:
        """(generation, step) of the residuals of `step` in the window; for None, the last step of each generation."""
        found = []
        for generation in self.index.window:
            steps = self.index.steps(generation, self.unit)
            if steps and (step is None or step in steps) and self.index.fits(generation, self.unit, self.layout):
                found.append((generation, steps[-1] if step is None else step))
        return found

    def _get(self, generation: int, step: int) -> Tensor | None:
        residual = self.index.get((generation, *self.unit, step))
        return residual if residual is None or self.device is None else residual.to(self.device)


@dataclass
class HookAnswers:
    """The answers of a unit's hooks: whether to compute, a tensor [B, N, D] to add, edits of the residual."""

    compute: bool | None = None
    replaced: Tensor | None = None
    edits: list[Edit] = field(default_factory=list)


def ask_hooks(hooks: Sequence[UnitHook], ctx: PolicyContext, compute: bool) -> HookAnswers:
    """Call each hook, with the decision of the policy and the hooks before it in `ctx.decision`.

    Raises:
        TypeError, ValueError: a hook returned something that `Cache.on_unit` does not allow.
    """
    answers = HookAnswers()
    for hook in list(hooks):
        ctx.decision = "compute" if (compute if answers.compute is None else answers.compute) else "reuse"
        answer = hook(ctx)
        if isinstance(answer, Tensor):
            assert ctx.base is not None
            answers.replaced, answers.compute = checked(answer, ctx.base, "A unit hook"), False
        elif answer in ("compute", "reuse"):
            answers.replaced, answers.compute = None, answer == "compute"
        elif callable(answer):
            answers.edits.append(answer)
        elif answer is not None:
            raise TypeError(
                f'A unit hook answered {answer!r}; it must answer "compute", "reuse", a tensor, a function or None.'
            )
    return answers


def checked(given: object, like: Tensor, source: str) -> Tensor:
    """`given`, if it is a tensor of the shape, dtype and device of `like`: broadcasting would hide a mistake.

    Raises:
        TypeError, ValueError: anything else; names the value that `source` returned and the valid ones.
    """
    valid = f"{list(like.shape)} of {like.dtype} on {like.device}, as the unit's input"
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{source} returned {given if given is None else type(given).__name__}; it must return a tensor {valid}."
        )
    if (given.shape, given.dtype, given.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"{source} returned a tensor {list(given.shape)} of {given.dtype} on {given.device}; it must be {valid}."
        )
    return given


def with_edits(output: Tensor, residual: Tensor, edits: Sequence[Edit]) -> Tensor:
    """The unit's output [B, N, D] with its residual changed by the edits, one after the other.

    `residual` stays unchanged, even if an edit works in place; edits that change nothing change no bit.
    """
    if not edits:
        return output
    changed = residual.clone()
    for edit in edits:
        changed = checked(edit(changed), residual, "The function of a unit hook")
    return output + (changed - residual)
