"""The contract of cache policies, and a policy made from its name and options.

A policy decides when a unit recomputes, and what replaces the unit's output on a skip.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edit_ray.cache.policies.option_types import OptionError
from edit_ray.registry import Registry

if TYPE_CHECKING:  # a configuration is checked without torch
    from torch import Tensor

    from edit_ray.cache.residuals import UnitResiduals


@dataclass
class UnitState:
    """The state of one (expert, branch, unit) between the steps of a call.

    `user` is the policy's own; `computed_steps` are those of this call at which the unit's blocks have run.
    """

    expert: str
    branch: str
    unit_index: int
    user: dict[str, Any] = field(default_factory=dict)
    computed_steps: list[int] = field(default_factory=list)


class StepSignals:
    """The policies' view of one forward of the transformer.

    `latents` are its input [B, C, T, h, w], `sigma` the noise level in [0, 1], if the denoising loop passes it. The
    embeddings are made and copied to the CPU at their first use: at most one device synchronisation per forward.
    """

    def __init__(self, embed: Callable[[], tuple[Tensor, Tensor]], latents: Tensor | None, sigma: float | None) -> None:
        self._embed, self.latents, self.sigma = embed, latents, sigma

    @property
    def e(self) -> Tensor:
        """Timestep embedding, float32 [1, D] on the CPU: TeaCache's `e`, diffusers' `temb` before it is cast."""
        return self._embedded[0]

    @property
    def e0(self) -> Tensor:
        """Its projection, float32 [1, 6, D] on the CPU: TeaCache's `e0`, diffusers' `timestep_proj`."""
        return self._embedded[1]

    @cached_property
    def _embedded(self) -> tuple[Tensor, Tensor]:
        e, e0 = self._embed()
        return e.cpu(), e0.cpu()


@dataclass
class PolicyContext:
    """A policy's view of one unit at one step of one branch.

    `hidden`: the unit's input [B, N, D]; None while a known mask is made. `encoder_hidden`: the blocks' text [B, L, D].
    `first_block_residual` [B, N, D]: with `needs_first_block_probe`, the output of the unit's first block minus
    `hidden`. A policy may set `signal`, `accumulated` and `threshold`, for the record of its decisions.
    """

    step: int
    num_steps: int
    branch: str
    expert: str
    unit_index: int
    num_units: int
    state: UnitState
    signals: StepSignals
    residuals: UnitResiduals
    hidden: Tensor | None = None
    encoder_hidden: Tensor | None = None
    first_block_residual: Tensor | None = None
    base: Tensor | None = None  # what residuals are added to: `hidden`, or with a probe the first block's output
    residual: Tensor | None = None  # of the step just computed, in `on_computed`
    signal: float | None = None
    accumulated: float | None = None
    threshold: float | None = None
    decision: str | None = None  # "compute" or "reuse", as hooks see it

    @property
    def e(self) -> Tensor:
        return self.signals.e

    @property
    def e0(self) -> Tensor:
        return self.signals.e0

    @property
    def latents(self) -> Tensor | None:
        return self.signals.latents

    @property
    def sigma(self) -> float | None:
        return self.signals.sigma

    def read_residual(self) -> Tensor | None:
        """A copy of the residual of the last computed step [B, N, D], or None if the store has evicted it."""
        residual = self.residuals.latest()
        return None if residual is None else residual.clone()

    def history(self) -> list[tuple[int, Tensor]]:
        """(step, copy of the residual) of the last computed steps, newest first, at most `history_len` of them."""
        return [(step, residual.clone()) for step, residual in self.residuals.history()]


class CachePolicy(ABC):
    """Decides, for every unit at every step, between computing and reusing. One instance serves all units and branches:
    its state belongs in `ctx.state.user`. A unit that has nothing to reuse computes, whatever its policy decides.
    """

    granularities: tuple[str, ...] = ("stack", "per_block", "groups")
    """The supported ones of "stack", "per_block" and "groups" (an integer)."""
    needs_first_block_probe: bool = False
    """Whether the unit's first block always runs, and the policy sees its residual."""
    timestep_only: bool = False
    """Whether `should_compute` reads only `step`, `num_steps`, `branch`, `expert`, `sigma`, `e`, `e0`, `state`
    and the presence of a reuse window: all its decisions are then made before the loop begins.
    """
    uncond_follows: bool = False
    """Whether a unit of "uncond" does what that of "cond" has just done: the two cannot run at the same time."""
    history_len: int = 1
    """The number of computed residuals that `reconstruct` reads."""
    kept_hidden: int = 0
    """How many tensors [B, N, D] a unit's state holds at most, besides the stored residuals."""
    kept_latents: int = 0
    """And how many of the latents' size."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the policy cannot serve a loop of `num_steps` steps."""
        return

    def most_skips(self, num_steps: int) -> int:
        """How many steps of a loop a unit can skip at most; the first has nothing to reuse."""
        return num_steps - 1

    def most_stored(self, num_steps: int) -> int:
        """How many residuals a unit stores at a time in a loop of `num_steps` steps at most."""
        return min(self.history_len, num_steps)

    def reset(self, state: UnitState) -> None:
        """Prepare `state.user` for a new call."""
        return

    @abstractmethod
    def should_compute(self, ctx: PolicyContext) -> bool:
        """Whether the unit's blocks run at this step. Called once per unit, step and branch, in the order of steps."""

    def warm(self, ctx: PolicyContext) -> None:
        """Called instead of `should_compute` where another rule reuses a residual of this same step."""
        self.should_compute(ctx)

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        """The unit's output [B, N, D] on a skip; None if that is impossible: the unit computes then."""
        residual = ctx.residuals.latest()
        return None if residual is None or ctx.base is None else ctx.base + residual

    def keeps(self, step: int) -> bool:
        """Whether later generations may read the residual of this step, so that newer residuals do not replace it."""
        return False

    def on_computed(self, ctx: PolicyContext) -> None:
        """Called after the unit has computed, whoever decided it; `ctx.residual` is its output minus `ctx.base`.

        Not called for policies with `timestep_only`: their decisions are made before the loop.
        """
        return


POLICIES: Registry[CachePolicy] = Registry("cache policy", "edit_ray.policies")
register_policy = POLICIES.register

_GRANULARITIES = {"stack": '"stack"', "per_block": '"per_block"', "groups": "an integer from {}, the size of a group"}


def make_policy(policy: str | CachePolicy, options: Mapping[str, Any]) -> CachePolicy:
    """The policy of a registered name, made with `options`; a `CachePolicy` is returned as it is.

    Raises:
        ValueError: no policy has this name, or an option's value is out of range.
        TypeError: the policy lacks a method; an option is unknown, missing, or of the wrong type.
    """
    if isinstance(policy, CachePolicy):
        if options:
            raise TypeError(
                f"{type(policy).__name__} is a policy that is made already; it takes no {', '.join(options)}."
            )
        return policy
    if not isinstance(policy, str):
        names = ", ".join(POLICIES.names())
        raise TypeError(f"policy is {policy!r}; it must be one of {names}, or a CachePolicy object.")
    cls = POLICIES.find(policy)
    where = f"{cls.__module__}.{getattr(cls, '__qualname__', cls)}"
    if not isinstance(cls, type) or not issubclass(cls, CachePolicy):
        raise TypeError(f"The cache policy {policy!r} is {where}, which is not a subclass of CachePolicy.")
    if missing := sorted(cls.__abstractmethods__):
        raise TypeError(f"The cache policy {policy!r} ({where}) lacks the method {', '.join(missing)}.")
    parameters = list(inspect.signature(cls).parameters.values())
    valid = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes = f"it takes {', '.join(valid)}" if valid else "it takes none"
    unknown = [option for option in options if option not in valid]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise OptionError(unknown[0], f"The cache policy {policy!r} has no option {', '.join(unknown)}; {takes}.")
    required = [p.name for p in parameters if p.name in valid and p.default is p.empty and p.name not in options]
    if required:
        raise OptionError(required[0], f"The cache policy {policy!r} needs the option {', '.join(required)}; {takes}.")
    return cls(**options)


def check_granularity(policy: CachePolicy, granularity: str | int) -> None:
    """Check that the policy supports a granularity: "stack", "per_block", or the size of a group.

    Raises:
        OptionError: it does not; names those that it supports.
        TypeError: the policy declares unknown granularities.
    """
    valid, where = policy.granularities, f"{type(policy).__module__}.{type(policy).__qualname__}"
    if not valid or not set(valid) <= set(_GRANULARITIES):
        raise TypeError(
            f"The cache policy {where} declares the granularities {valid!r}; "
            f"they must be some of {', '.join(_GRANULARITIES)}."
        )
    smallest = 1 if "per_block" in valid else 2  # a group of one is a block
    is_size = isinstance(granularity, int) and not isinstance(granularity, bool)
    supported = [kind for kind in valid if kind != "groups"]
    if not ("groups" in valid and int(granularity) >= smallest if is_size else granularity in supported):
        raise OptionError(
            "granularity",
            f"granularity is {granularity!r}; {type(policy).__name__} works with "
            f"{' or '.join(_GRANULARITIES[kind].format(smallest) for kind in valid)}.",
        )
