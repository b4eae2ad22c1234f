"""The vocabulary of the tier planner: events go in, instructions come out.

A request is named by a number that grows and is used once, a place by a ticket that is never given again. So whatever
speaks of a request that has ended, or of a place that is gone, is stale and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Key = tuple[str | int | None, ...]
Use = tuple[int, int]  # position (a segment, say) and order within the whole plan
Uses = Mapping[Key, Sequence[Use]]  # when each entry is read, in order

DropReason = Literal["evicted", "dead", "dropped", "replaced", "lost", "spill_failed", "full"]
Failure = Literal["lost", "transient", "full"]
Refusal = Literal["too_large", "no_room"]


@dataclass(frozen=True, slots=True)
class Place:
    """`size` bytes of an entry in one tier."""

    ticket: int
    key: Key
    size: int
    tier: str


# Events: what is asked for.


@dataclass(frozen=True, slots=True)
class Prepare:
    """A segment will read `reads`, in this order of use, and write `writes` (key, bytes).

    Answered by `Granted` once every write has room and every read is in the first tier, pinned; or by `Refused`.
    """

    request: int
    reads: tuple[Key, ...] = ()
    writes: tuple[tuple[Key, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """One entry is read now; it moves up if `promote` and if it is worth a place there. Answered by `Granted`."""

    request: int
    key: Key
    promote: bool = True


@dataclass(frozen=True, slots=True)
class Write:
    """One entry is written now, into the highest tier where it is worth a place. Answered by `Granted`."""

    request: int
    key: Key
    size: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """These will be read, in this order; as many as fit move into the first tier and are not pinned. No answer."""

    request: int
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """The holder waits for its request now: what is not in place yet comes late."""

    request: int


@dataclass(frozen=True, slots=True)
class Complete:
    """A granted request is over: its writes become visible, all at once; `written` names them where not all were."""

    request: int
    written: tuple[Key, ...] | None = None


@dataclass(frozen=True, slots=True)
class Abandon:
    """A request is given up, waiting or granted: nothing that it wrote stays."""

    request: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Entries that nobody wants any more, that were `lost` where they should be, or that found their tier `full`."""

    keys: tuple[Key, ...]
    reason: Literal["dropped", "lost", "full"] = "dropped"


@dataclass(frozen=True, slots=True)
class Full:
    """A tier holds less than its budget says: so many bytes, at least, of what goes first there are dropped."""

    tier: str
    size: int


@dataclass(frozen=True, slots=True)
class Found:
    """A tier held this entry before the planner was made; the least recently used are told first."""

    key: Key
    size: int
    tier: str


@dataclass(frozen=True, slots=True)
class Follow:
    """A reuse plan for the eviction policy: when each entry will be read."""

    uses: Uses


@dataclass(frozen=True, slots=True)
class Advance:
    """All that was planned before `position` is past."""

    position: int


# Events: what became of an instruction.


@dataclass(frozen=True, slots=True)
class Moved:
    """The bytes are in the place with this ticket."""

    ticket: int


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """They are not: the entry is `lost`, or may be read another time (`transient`), or the tier is `full`."""

    ticket: int
    failure: Failure


Event = (
    Prepare
    | Read
    | Write
    | Prefetch
    | Need
    | Complete
    | Abandon
    | Drop
    | Full
    | Found
    | Follow
    | Advance
    | Moved
    | MoveFailed
)


# Instructions, to be carried out in this order. Only a `Move` may take its time.


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the bytes of `source` to `target`, then answer with `Moved` or `MoveFailed` of the target's ticket."""

    source: Place
    target: Place


@dataclass(frozen=True, slots=True)
class Free:
    """Nobody uses this place any more."""

    place: Place


@dataclass(frozen=True, slots=True)
class Granted:
    """A place for each read and for each write, in the order of the request.

    None for a read that is a miss, and for a write that is not kept.
    """

    request: int
    reads: tuple[Place | None, ...]
    writes: tuple[Place | None, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The request cannot be served: the tier would have to hold `needed` bytes at once."""

    request: int
    reason: Refusal
    tier: str
    needed: int


Instruction = Move | Free | Granted | Refused
