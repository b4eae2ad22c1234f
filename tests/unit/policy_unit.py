"""One unit under a policy, without a model: what a test says it would compute, and a store that is a dictionary."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from edit_ray.cache.policies import CachePolicy, PolicyContext
from edit_ray.cache.policies.policy import UnitState

Kept = dict[tuple[int, int], Tensor]  # by generation and step


@dataclass(eq=False)
class RecordedSignals:
    """Implements `Signals` with what was recorded."""

    e: Tensor | None = None
    e0: Tensor | None = None
    latents: Tensor | None = None
    sigma: float | None = None


@dataclass
class KeptResiduals:
    """Implements `Residuals` for one generation; `lost` names what the store has let go."""

    kept: Kept
    computed: dict[int, list[int]]
    generation: int
    history_len: int
    window_of: tuple[int, ...] = ()
    lost: set[tuple[int, int]] = field(default_factory=set)

    def latest(self) -> Tensor | None:
        steps = self.computed.get(self.generation, [])
        return self._get(self.generation, steps[-1]) if steps else None

    def history(self) -> list[tuple[int, Tensor]]:
        newest = self.computed.get(self.generation, [])[-self.history_len :][::-1]
        read = [(step, self._get(self.generation, step)) for step in newest]
        return [(step, residual) for step, residual in read if residual is not None]

    def window_steps(self, step: int | None) -> int:
        return len(self._window(step))

    def window(self, step: int | None) -> list[Tensor]:
        read = [self._get(*where) for where in self._window(step)]
        return [residual for residual in read if residual is not None]

    def _window(self, step: int | None) -> list[tuple[int, int]]:
        steps = [(g, self.computed.get(g, [])) for g in self.window_of]
        return [(g, s[-1] if step is None else step) for g, s in steps if s and (step is None or step in s)]

    def _get(self, generation: int, step: int) -> Tensor | None:
        return None if (generation, step) in self.lost else self.kept.get((generation, step))


class Done(NamedTuple):
    computed: bool
    output: Tensor | None
    ctx: PolicyContext


class Unit:
    """Takes the steps of one branch through a policy, as the cache does for one unit."""

    def __init__(
        self,
        policy: CachePolicy,
        num_steps: int,
        *,
        branch: str = "cond",
        expert: str = "transformer",
        generation: int = 0,
        before: "Unit | None" = None,
        window: tuple[int, ...] = (),
    ) -> None:
        """`before`: an earlier generation, whose residuals stay."""
        policy.check(num_steps)
        self.policy, self.num_steps = policy, num_steps
        self.state = UnitState(expert, branch, 0)
        policy.reset(self.state)
        kept, computed = ({}, {}) if before is None else (before.residuals.kept, before.residuals.computed)
        computed[generation] = self.state.computed_steps
        self.residuals = KeptResiduals(kept, computed, generation, policy.history_len, window)

    def step(
        self,
        step: int,
        *,
        signals: RecordedSignals | None = None,
        hidden: Tensor | None = None,
        probe: Tensor | None = None,
        output: Tensor | None = None,
        force: bool | None = None,
    ) -> Done:
        """`probe`, `output` [B, N, D]: what the unit's first block and all its blocks make of `hidden` [B, N, D].

        `force` overrules the policy.
        """
        hidden = torch.zeros(1, 1, 1) if hidden is None else hidden
        ctx = PolicyContext(
            step=step,
            num_steps=self.num_steps,
            branch=self.state.branch,
            expert=self.state.expert,
            unit_index=0,
            num_units=1,
            state=self.state,
            signals=signals or RecordedSignals(),
            residuals=self.residuals,
            hidden=hidden,
            base=hidden,
        )
        if self.policy.needs_first_block_probe:
            ctx.base, ctx.first_block_residual = probe, probe - hidden
        compute = self.policy.should_compute(ctx)
        compute = compute if force is None else force
        rebuilt = None if compute else self.policy.reconstruct(ctx)
        if rebuilt is not None:
            return Done(False, rebuilt, ctx)
        output = ctx.base + 1 if output is None else output
        ctx.residual = output - ctx.base
        self.state.computed_steps.append(step)
        self.residuals.kept[self.residuals.generation, step] = ctx.residual
        if not self.policy.timestep_only:
            self.policy.on_computed(ctx)
        return Done(True, output, ctx)

    def mask(self, signals: list[RecordedSignals] | None = None) -> list[bool]:
        """Its decisions over all steps."""
        each = signals or [RecordedSignals()] * self.num_steps
        return [self.step(step, signals=seen).computed for step, seen in enumerate(each)]
