"""One unit under a policy, without a model: a test says what it would compute. Its residuals are in a real store."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from edit_ray.cache import GPUStore
from edit_ray.cache.policies import CachePolicy, PolicyContext
from edit_ray.cache.policies.policy import UnitState
from edit_ray.cache.residuals import ResidualIndex, UnitResiduals


@dataclass(eq=False)
class RecordedSignals:
    """Implements `StepSignals` with recorded values."""

    e: Tensor | None = None
    e0: Tensor | None = None
    latents: Tensor | None = None
    sigma: float | None = None


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
        self.index = ResidualIndex(GPUStore(), policy.history_len) if before is None else before.index
        self.index.generation, self.index.window = generation, window

    def lose(self, step: int, generation: int = 0) -> None:
        """The store loses a residual."""
        self.index.store.drop((generation, self.state.expert, self.state.branch, 0, step))

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
            residuals=UnitResiduals(self.index, (self.state.expert, self.state.branch, 0)),
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
        self.index.put(self.state, step, ctx.residual, self.policy.keeps)
        if not self.policy.timestep_only:
            self.policy.on_computed(ctx)
        return Done(True, output, ctx)

    def mask(self, signals: list[RecordedSignals] | None = None) -> list[bool]:
        """Its decisions over all steps."""
        each = signals or [RecordedSignals()] * self.num_steps
        return [self.step(step, signals=seen).computed for step, seen in enumerate(each)]
