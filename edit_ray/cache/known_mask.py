"""Known masks: the decisions of a policy that needs nothing but timesteps, made before the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from edit_ray.cache.adapters import ModelAdapter
from edit_ray.cache.blocks import Unit
from edit_ray.cache.policies.policy import CachePolicy, PolicyContext, StepSignals
from edit_ray.cache.residuals import UnitId

BRANCHES = ("cond", "uncond")


@dataclass(frozen=True)
class LoopStep:
    """What is known of a denoising step before the loop: its transformer, timestep [] and sigma."""

    expert: str
    timestep: Tensor
    sigma: float | None = None


@dataclass(frozen=True)
class Expert:
    """One transformer under a cache."""

    name: str
    transformer: nn.Module
    adapter: ModelAdapter
    units: tuple[Unit, ...]

    def signals(self, timestep: Tensor, latents: Tensor | None, sigma: float | None) -> StepSignals:
        """What a forward at `timestep`, [B] or [B, tokens], shows to the policies."""
        # The last token never belongs to clean context latents, whose timestep is 0.
        return StepSignals(
            lambda: self.adapter.embed_timestep(self.transformer, timestep.flatten()[-1:]), latents, sigma
        )


def check_not_compiled(transformer: nn.Module) -> None:
    """Raises ValueError for a transformer that is compiled as a whole; its blocks may be."""
    if getattr(transformer, "_orig_mod", None) is not None or transformer._compiled_call_impl is not None:
        raise ValueError(
            f"This {type(transformer).__name__} is compiled as a whole, which freezes every decision: compile its "
            "blocks instead (transformer.compile_repeated_blocks())."
        )


@dataclass(frozen=True)
class KnownDecision:
    """A decision made before the loop, with what the policy compared."""

    compute: bool
    signal: float | None
    accumulated: float | None
    threshold: float | None


KnownMask = dict[UnitId, list[KnownDecision | None]]
"""A decision for each step of the loop, by unit; None where another expert runs."""

MakeContext = Callable[[Expert, str, Unit, int, StepSignals, Tensor | None], PolicyContext]


def known_mask(
    policy: CachePolicy,
    experts: Mapping[str, Expert],
    steps: Sequence[LoopStep],
    branches: Sequence[str],
    context: MakeContext,
) -> KnownMask:
    """Ask the policy for every unit at every step, as the loop would."""
    mask: KnownMask = {}
    for step, at in enumerate(steps):
        expert = experts[at.expert]
        device = next(expert.transformer.parameters()).device
        signals = expert.signals(at.timestep.reshape(1).to(device), None, at.sigma)
        for branch in branches:
            for unit in expert.units:
                ctx = context(expert, branch, unit, step, signals, None)
                compute = bool(policy.should_compute(ctx))
                if compute:
                    ctx.state.computed_steps.append(step)
                decisions = mask.setdefault((expert.name, branch, unit.index), [None] * len(steps))
                decisions[step] = KnownDecision(compute, ctx.signal, ctx.accumulated, ctx.threshold)
    return mask
