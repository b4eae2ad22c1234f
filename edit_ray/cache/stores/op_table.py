"""What the store and a segment say to each other through shared memory while the segment is made.

A segment's reads and writes, in the order of use, are its ops. Each has two words in a table that both processes map:
`place`, which the store writes, and `state`, which the segment writes. So between `prepare` and `complete` neither
calls the other, and what a segment works on may be more than the arena holds: the store brings what is next while the
segment uses what is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edit_ray.cache.stores.store import Key

WAITING, NONE = 0, -1  # words of `place`; any other is an offset in the arena, plus 1
UNTOUCHED, NEEDED, DONE, SKIPPED = 0, 1, 2, 3  # words of `state`
_WORD = np.dtype(np.int64)


@dataclass(frozen=True)
class Op:
    """One read or write of one entry."""

    key: Key
    size: int
    writes: bool


def table_bytes(num_ops: int) -> int:
    """Bytes of a table."""
    return 2 * num_ops * _WORD.itemsize


class OpTable:
    """The words of a segment's ops, over memory of at least `table_bytes`.

    A word is written by one side only, and is whole as it is aligned. The store writes a place when its bytes are
    there; the segment writes DONE when it is through with them.
    """

    def __init__(self, memory: memoryview, num_ops: int) -> None:
        words: NDArray[np.int64] = np.frombuffer(memory[: table_bytes(num_ops)], dtype=_WORD)
        self._places, self._states = words[:num_ops], words[num_ops:]

    def clear(self) -> None:
        """All waiting, none touched."""
        self._places[:] = WAITING
        self._states[:] = UNTOUCHED

    # The store's side.

    def give(self, index: int, offset: int | None) -> None:
        """The place of an op; None if it has none: a read that was lost, a write that nobody keeps."""
        self._places[index] = NONE if offset is None else offset + 1

    def states(self) -> list[int]:
        """The state of every op."""
        states: list[int] = self._states.tolist()
        return states

    # The segment's side.

    def place(self, index: int) -> int | None:
        """The offset of an op, or WAITING - 1 while it has none yet; None if it never will."""
        word = int(self._places[index])
        return None if word == NONE else word - 1

    def mark(self, index: int, state: int) -> None:
        """Say what has become of an op."""
        self._states[index] = state
