"""A segment between `prepare` and `complete`, as the store sees it and as it is handed out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from edit_ray.cache.stores.allocator import Extent
from edit_ray.cache.stores.op_table import UNTOUCHED, Op, OpTable


@dataclass(frozen=True)
class Lease:
    """What `prepare` hands out: the arena's path, where in it the table of the segment's ops is, and whose it is.

    `arena` is "" where there is no shared memory. `store` is the incarnation of the store that gave it.
    """

    arena: str
    table: Extent
    num_ops: int
    store: str = ""


@dataclass(eq=False)
class OpenSegment:
    """A segment that was prepared and not completed; `requests` are the planner's, one for each op.

    Threads of the store's own process that use a place, because the segment cannot reach it, hold `using` meanwhile.
    """

    ops: Sequence[Op]
    holder: object
    attempt: int
    extent: Extent
    table: OpTable
    requests: range
    form: tuple[torch.dtype, tuple[int, ...]]
    seen: list[int] = field(init=False)  # the states at the last look
    done: set[int] = field(default_factory=set)  # ops that are over
    using: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def __post_init__(self) -> None:
        self.seen = [UNTOUCHED] * len(self.ops)

    def close(self) -> None:
        """From now on nobody uses its places."""
        with self.using:
            self.closed = True
