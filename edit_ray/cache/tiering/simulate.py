"""What a tiered store would do with a list of accesses: the planner itself, its instructions carried out on paper."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edit_ray.cache.tiering.events import (
    Advance,
    Complete,
    Event,
    Follow,
    Granted,
    Key,
    Move,
    Moved,
    Place,
    Read,
    Use,
    Write,
)
from edit_ray.cache.tiering.eviction import EvictionPolicy
from edit_ray.cache.tiering.planner import TierPlanner
from edit_ray.cache.tiering.residency import STAGING
from edit_ray.cache.tiering.reuse_plan import CacheKey, ReusePlan


@dataclass(frozen=True, slots=True)
class Access:
    """At `position` an entry is read, and on a miss computed in `seconds` and stored; or it is written anew."""

    position: int
    key: Key
    size: int
    seconds: float = 0.0
    write: bool = False


@dataclass
class Simulated:
    """What came of it. `hits` per tier, by where an entry was when it was asked for."""

    reads: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    bytes_written: Counter[str] = field(default_factory=Counter)  # into each tier, spills and first writes alike
    stall_seconds: float = 0.0  # of bringing what was hit to the first tier
    recompute_seconds: float = 0.0  # of computing what was missed
    saved_seconds: float = 0.0  # of computing what was hit
    bound_seconds: float = 0.0  # of `saved_seconds`: no choice of victims saves more

    @property
    def hit_rate(self) -> float:
        return sum(self.hits.values()) / self.reads if self.reads else 0.0

    @property
    def ratio(self) -> float:
        """Seconds saved to what is the most that could be."""
        return self.saved_seconds / self.bound_seconds if self.bound_seconds else 1.0


def uses_of(accesses: Sequence[Access]) -> dict[Key, list[Use]]:
    """The reads as a plan for `FurthestNextUse`."""
    uses: dict[Key, list[Use]] = {}
    for order, access in enumerate(accesses):
        if not access.write:
            uses.setdefault(access.key, []).append((access.position, order))
    return uses


def accesses_of(plan: ReusePlan, seconds: Callable[[CacheKey], float]) -> list[Access]:
    """A reuse plan's writes and reads as they come; `seconds` says how long an entry takes to compute."""
    found = []
    for index, segment in enumerate(plan.segments):
        planned = [(each, write) for write, those in ((False, segment.reads), (True, segment.writes)) for each in those]
        planned.sort(key=lambda pair: pair[0].step)
        found += [Access(index, each.key, each.size, seconds(each.key), write) for each, write in planned]
    return found


def simulate(
    accesses: Sequence[Access],
    tiers: Sequence[tuple[str, int | None]],
    eviction: str | EvictionPolicy,
    rates: Mapping[tuple[str, str], float] | None = None,
) -> Simulated:
    """Let a planner serve the accesses one by one, each carried out before the next.

    Nothing is brought ahead of time, so `stall_seconds` is what planned prefetch has to hide, not what is left of it.

    Args:
        accesses: In order; positions must not fall.
        tiers: Name and budget in bytes, fastest first; None for no bound.
        eviction: As for `TierPlanner`; one that follows a plan is given the accesses themselves as its plan.
        rates: Bytes per second from one tier to another; a pair that is missing takes no time.
    """
    model = _Model(tiers, eviction, rates or {})
    model.handle(Follow(uses_of(accesses)))
    result = Simulated(bound_seconds=offline_bound(accesses, _total([budget for _, budget in tiers])))
    position = 0
    for number, access in enumerate(accesses):
        if access.position > position:
            position = access.position
            model.handle(Advance(position))
        found = None if access.write else model.read(2 * number + 1, access.key)
        if found is not None:
            tier, seconds = found
            result.hits[tier] += 1
            result.stall_seconds += seconds
            result.saved_seconds += access.seconds
        else:
            result.recompute_seconds += 0.0 if access.write else access.seconds
            model.write(2 * number + 2, access.key, access.size)
        result.reads += not access.write
    written = model.planner.counters.bytes_into
    result.bytes_written.update({tier: size for tier, size in written.items() if tier != STAGING})
    return result


def offline_bound(accesses: Sequence[Access], capacity: float) -> float:
    """Seconds of computing that at most can be saved with so many bytes, in however many tiers, all being known before.

    A read can only be a hit if its entry was kept since it was last read or written, which takes its size times the
    accesses between; all tiers together offer `capacity` times the number of accesses. Filling that with the intervals
    that save most per byte and access, the last one in part, is the linear relaxation of the best choice, hence never
    below it. Source: PFOO-L in Berger, Beckmann and Harchol-Balter, "Practical Bounds on Optimal Caching with Variable
    Object Sizes", POMACS 2018, with seconds in the place of hits.
    """
    last: dict[Key, int] = {}
    intervals = []
    for i, access in enumerate(accesses):
        if not access.write and access.key in last and access.size <= capacity:
            intervals.append((access.size * (i - last[access.key]), access.seconds))
        last[access.key] = i
    room, saved = capacity * len(accesses), 0.0
    for cost, seconds in sorted(intervals, key=lambda interval: -interval[1] / max(interval[0], 1e-9)):
        share = min(1.0, room / cost) if cost else 1.0
        saved += share * seconds
        room -= share * cost
        if room <= 0:
            break
    return saved


def _total(budgets: Sequence[int | None]) -> float:
    return float("inf") if None in budgets else float(sum(budget or 0 for budget in budgets))


class _Model:
    """Carries out every instruction at once, in no time that anybody waits for but that of reads."""

    def __init__(
        self,
        tiers: Sequence[tuple[str, int | None]],
        eviction: str | EvictionPolicy,
        rates: Mapping[tuple[str, str], float],
    ) -> None:
        self.planner = TierPlanner(tiers, eviction, staging_bytes=None)
        self._top, self._rates = tiers[0][0], rates

    def handle(self, event: Event) -> Granted | None:
        todo, granted = deque(self.planner.handle(event)), None
        while todo:
            instruction = todo.popleft()
            if isinstance(instruction, Move):
                todo.extend(self.planner.handle(Moved(instruction.target.ticket)))
            elif isinstance(instruction, Granted):
                granted = instruction
        return granted

    def read(self, number: int, key: Key) -> tuple[str, float] | None:
        """The tier where the entry was, and the seconds to bring it to the first one; None for a miss."""
        place = self.planner.place(key)
        self.handle(Read(number, key))
        self.handle(Complete(number))
        return None if place is None else (place.tier, self._seconds(place))

    def write(self, number: int, key: Key, size: int) -> None:
        self.handle(Write(number, key, size))
        self.handle(Complete(number))

    def _seconds(self, place: Place) -> float:
        if place.tier == self._top:
            return 0.0
        rate = self._rates.get((place.tier, self._top))
        return place.size / rate if rate else 0.0
