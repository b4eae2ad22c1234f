"""Units, the slices of the block stack that one cache decision covers, and the runner that skips their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edit_ray.cache.policies.policy import PolicyContext, StepSignals

if TYPE_CHECKING:  # units are counted without torch
    from torch import Tensor, nn

    from edit_ray.cache.adapters import ModelAdapter
    from edit_ray.cache.cache import Cache

RunBlock = Callable[..., Any]


@dataclass(frozen=True)
class Unit:
    """Blocks `first` to `last`, both inclusive."""

    index: int
    first: int
    last: int


def split_blocks(num_blocks: int, granularity: str | int) -> tuple[Unit, ...]:
    """The units of a stack: one, one per block, or groups of k blocks, of which the last may be smaller.

    Raises ValueError: fewer blocks than a group has.
    """
    size = {"stack": num_blocks, "per_block": 1}.get(str(granularity)) or int(granularity)
    if not 1 <= size <= num_blocks:
        raise ValueError(
            f"granularity is {granularity!r}; it must be 'stack', 'per_block' or a group size from 1 to {num_blocks}."
        )
    firsts = range(0, num_blocks, size)
    return tuple(Unit(i, first, min(first + size, num_blocks) - 1) for i, first in enumerate(firsts))


@dataclass(frozen=True)
class Expert:
    """One transformer under a cache."""

    name: str
    transformer: nn.Module
    adapter: ModelAdapter
    units: tuple[Unit, ...]

    def signals(self, timestep: Tensor, latents: Tensor | None, sigma: float | None) -> StepSignals:
        """The policies' view of a forward at `timestep`, [B] or [B, tokens]."""
        # The last token never belongs to clean context latents, whose timestep is 0.
        return StepSignals(
            lambda: self.adapter.embed_timestep(self.transformer, timestep.flatten()[-1:]), latents, sigma
        )


def check_not_compiled(transformer: nn.Module) -> None:
    """Raise ValueError for a transformer that is compiled as a whole; its blocks may be."""
    if getattr(transformer, "_orig_mod", None) is not None or transformer._compiled_call_impl is not None:
        raise ValueError(
            f"This {type(transformer).__name__} is compiled as a whole, which freezes every decision: compile its "
            "blocks instead (transformer.compile_repeated_blocks())."
        )


class Hint:
    """What a control block gives, computed when it is added to the hidden states; scaled before, as a tensor is."""

    def __init__(self, runner: BlockRunner, value: Callable[[], Tensor]) -> None:
        self._runner, self.value = runner, value

    def to(self, device: object) -> Hint:
        """Itself: it is where the hidden states are."""
        return self

    def __mul__(self, scale: Tensor) -> Hint:
        return Hint(self._runner, lambda: self.value() * scale)

    def __radd__(self, hidden: Tensor) -> Tensor:
        return self._runner.add(hidden, self)


def value_of(argument: Any) -> Any:
    """An argument of a control block; computed, if it is another one's result."""
    return argument.value() if isinstance(argument, Hint) else argument


class BlockRunner:
    """Runs one forward of a transformer: called in place of each block, in the order of the stack.

    A unit that computes returns exactly what its blocks return. A model may change the hidden states between two
    blocks: a residual excludes this, as the model repeats it when the unit is skipped. The hints of control blocks are
    computed when they are added: a residual includes those inside its unit, and a skipped unit needs none of them.
    """

    def __init__(
        self, cache: Cache, adapter: ModelAdapter, units: Sequence[Unit], context: Callable[[Unit], PolicyContext]
    ) -> None:
        self._cache, self._adapter, self._context = cache, adapter, context
        self._unit_at = {position: unit for unit in units for position in range(unit.first, unit.last + 1)}
        self._num_entered = 0
        self._reused = False
        self._ctx: PolicyContext | None = None
        self._before: Tensor | None = None  # output of the previous block
        self._between: Tensor | None = None  # added by the model between the unit's blocks
        self._position = 0  # of the latest block

    def block(self, position: int, run: RunBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output of a block; while its unit is skipped, of the whole unit."""
        unit, hidden, self._position = self._unit_at[position], self._adapter.hidden(args, kwargs), position
        if position == unit.first:
            return self._enter(unit, hidden, run, args, kwargs)
        if self._reused:
            return hidden
        if hidden is not self._before and self._before is not None:
            change = hidden - self._before
            self._between = change if self._between is None else self._between + change
        return self._computed(unit, position, run(*args, **kwargs))

    def control(self, run: RunBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hint, Hint]:
        """A control block's hint and its hidden states, neither computed yet."""

        results: list[Any] = []

        def take(which: int) -> Any:  # each is used once, and freed then
            if not results:
                results.extend(run(*map(value_of, args), **{name: value_of(value) for name, value in kwargs.items()}))
            taken, results[which] = results[which], None
            return taken

        return Hint(self, lambda: take(0)), Hint(self, lambda: take(1))

    def add(self, hidden: Tensor, hint: Hint) -> Tensor:
        """The hidden states after the latest block, with a hint unless the block is skipped and its unit continues."""
        if self._reused and self._position < self._unit_at[self._position].last:
            return hidden
        self._before = hidden + hint.value()
        return self._before

    def check_complete(self, units: Sequence[Unit], name: str) -> None:
        """Raise RuntimeError if a unit was not asked: a cache without effect is an error."""
        if self._num_entered != len(units):
            raise RuntimeError(
                f"The cache of {name} was asked for {self._num_entered} of {len(units)} units in one forward: "
                "something has replaced its blocks or how they are called. Disable the cache before changing the model."
            )

    def _enter(
        self, unit: Unit, hidden: Tensor, run: RunBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        ctx = self._ctx = self._context(unit)
        self._num_entered += 1
        ctx.hidden = ctx.base = hidden
        ctx.encoder_hidden = self._adapter.encoder_hidden(args, kwargs)
        self._between, output = None, None
        if self._cache.policy.needs_first_block_probe:
            ctx.base = output = run(*args, **kwargs)
            ctx.first_block_residual = output - hidden
        # A unit whose only block is the probe has nothing left to skip.
        skipped = self._cache.decide(ctx, can_skip=output is None or unit.first < unit.last)
        self._reused = skipped is not None
        if skipped is not None:
            return skipped
        return self._computed(unit, unit.first, run(*args, **kwargs) if output is None else output)

    def _computed(self, unit: Unit, position: int, output: Tensor) -> Tensor:
        self._before = output
        if position < unit.last:
            return output
        assert self._ctx is not None
        return self._cache.computed(self._ctx, output, self._between)
