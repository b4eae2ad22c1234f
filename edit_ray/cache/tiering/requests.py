"""What the planner remembers of a request while it waits and while it is granted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edit_ray.cache.tiering.account import Entry
from edit_ray.cache.tiering.events import Key, Place

# segment: everything in the first tier, pinned until it completes. demand: one entry, where it is worth a place.
# hint: moves up, is not pinned. rest: what an abandoned request has left in staging finds a tier.
Kind = Literal["segment", "demand", "hint", "rest"]


@dataclass(slots=True, eq=False)
class Wanted:
    """One read."""

    key: Key
    entry: Entry | None = None  # pinned; None once settled is a miss
    ticket: int | None = None  # of the move that brings it
    settled: bool = False
    counted: bool = False  # as a prefetch that has no outcome yet
    late: bool = False


@dataclass(slots=True, eq=False)
class Given:
    """One write."""

    key: Key
    size: int
    place: Place | None = None  # None is not kept, or not yet


@dataclass(slots=True, eq=False)
class Request:
    """What is asked for, and what of it is still open: to be found, to be brought, on its way, to be given a place."""

    number: int
    kind: Kind
    reads: list[Wanted] = field(default_factory=list)
    writes: list[Given] = field(default_factory=list)
    promote: bool = True
    needed: bool = False
    to_find: list[Wanted] = field(init=False)
    to_bring: list[Wanted] = field(default_factory=list)
    moving: int = 0
    to_place: list[Given] = field(init=False)

    def __post_init__(self) -> None:
        self.to_find, self.to_place = list(self.reads), list(self.writes)

    @property
    def settled(self) -> bool:
        """Whether every read and write is in place, or known to be none."""
        return not (self.to_find or self.to_bring or self.moving or self.to_place)

    def become_rest(self, lifted: list[Wanted]) -> None:
        """Nothing is left of it but what it has lifted to staging, or is lifting."""
        self.kind, self.reads, self.writes = "rest", lifted, []
        self.to_find, self.to_place = [], []
        self.to_bring = [read for read in lifted if read.ticket is None]
        self.moving = len(lifted) - len(self.to_bring)


class Writers:
    """Which requests that are not over will write which key: a later read waits for them."""

    def __init__(self) -> None:
        self._sizes: dict[Key, dict[int, int]] = {}  # by key and request, in order

    def add(self, request: Request) -> None:
        for write in request.writes:
            self._sizes.setdefault(write.key, {})[request.number] = write.size

    def remove(self, request: Request) -> None:
        for write in request.writes:
            numbers = self._sizes.get(write.key, {})
            numbers.pop(request.number, None)
            if not numbers:
                self._sizes.pop(write.key, None)

    def size_before(self, key: Key, number: int) -> int | None:
        """Bytes that the last request before this one will write; None if none will."""
        sizes = [size for writer, size in self._sizes.get(key, {}).items() if writer < number]
        return sizes[-1] if sizes else None
