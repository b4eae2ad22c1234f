"""What a cache policy is: it says when a unit recomputes, and what stands in for the unit when it does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edit_ray.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor  # a configuration is checked without torch


@dataclass
class UnitState:
    """What one (expert, branch, unit) remembers between the steps of a call.

    `user` is the policy's own; `computed_steps` are those of this call at which the unit's blocks have run.
    """

    expert: str
    branch: str
    unit_index: int
    user: dict[str, Any] = field(default_factory=dict)
    computed_steps: list[int] = field(default_factory=list)


class Signals(Protocol):
    """What one forward of the transformer shows to the policies; the embeddings are made when first asked for."""

    @property
    def e(self) -> Tensor:
        """Timestep embedding, float32 [1, D] on the CPU: TeaCache's `e`, diffusers' `temb` before it is cast."""

    @property
    def e0(self) -> Tensor:
        """Its projection, float32 [1, 6, D] on the CPU: TeaCache's `e0`, diffusers' `timestep_proj`."""

    @property
    def latents(self) -> Tensor | None:
        """The transformer's input [B, C, T, h, w]."""

    @property
    def sigma(self) -> float | None:
        """Noise level in [0, 1], where the denoising loop tells it."""


class Residuals(Protocol):
    """The stored residuals that a unit may read at its step, for reading only: they are the store's own tensors."""

    def latest(self) -> Tensor | None:
        """Of the last computed step."""

    def history(self) -> list[tuple[int, Tensor]]:
        """Of the last computed steps, newest first, as far as they are still there."""

    def window_steps(self, step: int | None) -> int:
        """How many generations of the reuse window have computed `step` (or, for None, any step at all)."""

    def window(self, step: int | None) -> list[Tensor]:
        """Their residuals, oldest generation first, as far as they are still there."""


@dataclass
class PolicyContext:
    """One unit at one step of one branch, as a policy sees it.

    `hidden`: the unit's input [B, N, D]; None while a plan is made. `encoder_hidden`: the text [B, L, D] that the
    blocks see. `first_block_residual` [B, N, D]: with `needs_first_block_probe`, what the unit's first block has added
    to `hidden`.
    A policy may leave what it decided on in `signal`, `accumulated` and `threshold`, for the record.
    """

    step: int
    num_steps: int
    branch: str
    expert: str
    unit_index: int
    num_units: int
    state: UnitState
    signals: Signals
    residuals: Residuals
    hidden: Tensor | None = None
    encoder_hidden: Tensor | None = None
    first_block_residual: Tensor | None = None
    base: Tensor | None = None  # what residuals are added to: `hidden`, or with a probe the first block's output
    residual: Tensor | None = None  # of the step just computed, in `on_computed`
    signal: float | None = None
    accumulated: float | None = None
    threshold: float | None = None
    decision: str | None = None  # "compute" or "reuse": what is about to happen, as hooks see it

    @property
    def e(self) -> Tensor:
        """See `Signals`."""
        return self.signals.e

    @property
    def e0(self) -> Tensor:
        """See `Signals`."""
        return self.signals.e0

    @property
    def latents(self) -> Tensor | None:
        """See `Signals`."""
        return self.signals.latents

    @property
    def sigma(self) -> float | None:
        """See `Signals`."""
        return self.signals.sigma

    def read_residual(self) -> Tensor | None:
        """A copy of the residual of the last computed step [B, N, D], or None if the store has let it go."""
        residual = self.residuals.latest()
        return None if residual is None else residual.clone()

    def history(self) -> list[tuple[int, Tensor]]:
        """(step, copy of the residual) of the last computed steps, newest first, at most `history_len` of them."""
        return [(step, residual.clone()) for step, residual in self.residuals.history()]


class CachePolicy(ABC):
    """Decides, for every unit at every step, between computing and reusing. One instance serves all units and branches:
    whatever it remembers belongs in `ctx.state.user`.

    A unit that has nothing to reuse computes, whatever its policy says.
    """

    granularities: tuple[str, ...] = ("stack", "per_block", "groups")
    """What it has meaning for, of "stack", "per_block" and "groups" (an integer)."""
    needs_first_block_probe: bool = False
    """Whether the unit's first block always runs, and the policy sees what it added."""
    timestep_only: bool = False
    """Whether `should_compute` reads nothing but `step`, `num_steps`, `branch`, `expert`, `sigma`, `e`, `e0`, `state`
    and the presence of a reuse window: then all its decisions are made before the loop begins.
    """
    history_len: int = 1
    """How many computed residuals `reconstruct` reads."""

    def check(self, num_steps: int) -> None:
        """Raises ValueError if the policy cannot serve a call of so many steps."""
        return

    def reset(self, state: UnitState) -> None:
        """Prepare `state.user` for a new call."""
        return

    @abstractmethod
    def should_compute(self, ctx: PolicyContext) -> bool:
        """Whether the unit's blocks run at this step. Called once per unit, step and branch, in the order of steps."""

    def warm(self, ctx: PolicyContext) -> None:
        """Called instead of `should_compute` where another rule has decided to reuse a residual of this same step."""
        self.should_compute(ctx)

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        """The unit's output [B, N, D] on a skip; None if it cannot be made, and then the unit computes."""
        residual = ctx.residuals.latest()
        return None if residual is None or ctx.base is None else ctx.base + residual

    def keeps(self, step: int) -> bool:
        """Whether later generations may read the residual of this step, so that it stays when newer ones come."""
        return False

    def on_computed(self, ctx: PolicyContext) -> None:
        """Called after the unit has computed, for whatever reason; `ctx.residual` is what it added to `ctx.base`.

        Not called for policies with `timestep_only`, whose decisions are made by then.
        """
        return


POLICIES: Registry[CachePolicy] = Registry("cache policy", "edit_ray.policies")
register_policy = POLICIES.register
