"""Decisions that are made before the loop, where a policy depends on its steps alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from edit_ray.cache.blocks import Expert, Unit
from edit_ray.cache.cfg_gate import CfgGate, gated_steps
from edit_ray.cache.loop_position import LoopStep
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, StepSignals
from edit_ray.cache.residuals import UnitId


class KnownDecision(NamedTuple):
    """A decision made before the loop, with the values that the policy compared."""

    compute: bool
    signal: float | None
    accumulated: float | None
    threshold: float | None


Mask = dict[UnitId, list[KnownDecision | None]]
"""By step; None where another expert runs."""


def decide_ahead(
    policy: CachePolicy,
    experts: Mapping[str, Expert],
    steps: Sequence[LoopStep],
    branches: Sequence[str],
    gate: CfgGate | None,
    context: Callable[[Expert, str, Unit, int, StepSignals], PolicyContext],
) -> Mask:
    """Ask the policy for every unit at every step; what the gate leaves out does not compute."""
    mask: Mask = {}
    gated = [False] * len(steps) if gate is None else gated_steps(gate.share, [at.expert for at in steps])
    for step, at in enumerate(steps):
        expert = experts[at.expert]
        device = next(expert.transformer.parameters()).device
        signals = expert.signals(at.timestep.reshape(1).to(device), None, at.sigma)
        for branch, unit in itertools.product(branches, expert.units):
            ctx = context(expert, branch, unit, step, signals)
            compute = bool(policy.should_compute(ctx)) and not (branch == "uncond" and gated[step])
            if compute:
                ctx.state.computed_steps.append(step)
            decisions = mask.setdefault((expert.name, branch, unit.index), [None] * len(steps))
            decisions[step] = KnownDecision(compute, ctx.signal, ctx.accumulated, ctx.threshold)
    return mask
