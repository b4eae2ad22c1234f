"""Units: the slices of the block stack that one cache decision covers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Blocks `first` to `last`, both inclusive."""

    index: int
    first: int
    last: int


def split_blocks(num_blocks: int, granularity: str | int) -> tuple[Unit, ...]:
    """The units of a stack: one for "stack", one a block for "per_block", or groups of so many, the last maybe smaller.

    Raises:
        ValueError: no block, or no such granularity.
    """
    if num_blocks < 1:
        raise ValueError("The model has no blocks to cache.")
    sizes = {"stack": num_blocks, "per_block": 1}
    size = sizes.get(granularity) if isinstance(granularity, str) else granularity
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= num_blocks:
        raise ValueError(
            f"granularity is {granularity!r}; valid are 'stack', 'per_block' and a group size from 1 to {num_blocks}."
        )
    firsts = range(0, num_blocks, size)
    return tuple(Unit(i, first, min(first + size, num_blocks) - 1) for i, first in enumerate(firsts))
