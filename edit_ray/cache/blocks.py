"""One forward of a transformer through its units: who computes, who is skipped, what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edit_ray.cache.adapters import ModelAdapter
from edit_ray.cache.policies.policy import PolicyContext
from edit_ray.cache.units import Unit

if TYPE_CHECKING:
    from edit_ray.cache.cache import Cache

RunBlock = Callable[..., Any]


class BlockRunner:
    """Called in place of every block, in the order of the stack.

    On the compute path a unit's output is its blocks' own. A model may change the hidden states between two blocks (Wan
    VACE adds its hints there): a residual leaves such changes out, since the model makes them on a skip as well.
    """

    def __init__(
        self, cache: Cache, adapter: ModelAdapter, units: Sequence[Unit], context: Callable[[Unit], PolicyContext]
    ) -> None:
        self._cache, self._adapter, self._context = cache, adapter, context
        self._unit_at = {position: unit for unit in units for position in range(unit.first, unit.last + 1)}
        self._asked = 0
        self._reused = False
        self._ctx: PolicyContext | None = None
        self._before: Tensor | None = None  # the output of the block before
        self._between: Tensor | None = None  # what the model has added between the unit's blocks

    def block(self, position: int, run: RunBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output of a block, or what stands in for it."""
        unit, hidden = self._unit_at[position], self._adapter.hidden(args, kwargs)
        if position == unit.first:
            self._asked += 1
            return self._enter(unit, hidden, run, args, kwargs)
        if self._reused:
            return hidden
        if hidden is not self._before and self._before is not None:
            change = hidden - self._before
            self._between = change if self._between is None else self._between + change
        return self._went_on(unit, position, run(*args, **kwargs))

    def check_complete(self, units: Sequence[Unit], name: str) -> None:
        """Raises RuntimeError if a unit was not asked: a cache that does nothing must not stay unseen."""
        if self._asked != len(units):
            raise RuntimeError(
                f"The cache of {name} was asked for {self._asked} of {len(units)} units in one forward: "
                "something has replaced its blocks or how they are called. Disable the cache before changing the model."
            )

    def _enter(
        self, unit: Unit, hidden: Tensor, run: RunBlock, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        ctx = self._ctx = self._context(unit)
        ctx.hidden = ctx.base = hidden
        ctx.encoder_hidden = self._adapter.encoder_hidden(args, kwargs)
        self._reused, self._between, output = False, None, None
        if self._cache.policy.needs_first_block_probe:
            ctx.base = output = run(*args, **kwargs)
            ctx.first_block_residual = output - hidden
        # Of a unit whose only block is the probe nothing is left to skip.
        skipped = self._cache.decide(ctx, can_skip=output is None or unit.first < unit.last)
        if skipped is not None:
            self._reused = True
            return skipped
        if output is None:
            output = run(*args, **kwargs)
        return self._went_on(unit, unit.first, output)

    def _went_on(self, unit: Unit, position: int, output: Tensor) -> Tensor:
        self._before = output
        if position < unit.last:
            return output
        assert self._ctx is not None
        return self._cache.computed(self._ctx, output, self._between)
