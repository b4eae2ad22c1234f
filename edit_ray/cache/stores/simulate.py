"""Simulation of a `TieredStore` on a list of accesses: the store itself, over tiers that hold sizes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edit_ray.cache.stores.eviction import EvictionPolicy
from edit_ray.cache.stores.tiered import TieredStore
from edit_ray.tiers.reuse_plan import CacheKey, Key, ReusePlan, Use


@dataclass(frozen=True, slots=True)
class Access:
    """A read of an entry at `position`, computed in `seconds` and stored on a miss; or a write of it."""

    position: int
    key: Key
    size: int
    seconds: float = 0.0
    write: bool = False


@dataclass
class Simulated:
    """The result. `hits` are counted by the tier that held an entry when it was read."""

    reads: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    bytes_written: Counter[str] = field(default_factory=Counter)  # into each tier, spills and first writes alike
    stall_seconds: float = 0.0  # of moving hits to the first tier
    recompute_seconds: float = 0.0  # of computing misses
    saved_seconds: float = 0.0  # of computing hits
    bound_seconds: float = 0.0  # of `saved_seconds`: no eviction order saves more

    @property
    def hit_rate(self) -> float:
        return sum(self.hits.values()) / self.reads if self.reads else 0.0

    @property
    def ratio(self) -> float:
        """Seconds saved as a share of the bound."""
        return self.saved_seconds / self.bound_seconds if self.bound_seconds else 1.0


def uses_of(accesses: Sequence[Access]) -> dict[Key, list[Use]]:
    """The reads as a plan for `FurthestNextUse`."""
    uses: dict[Key, list[Use]] = {}
    for order, access in enumerate(accesses):
        if not access.write:
            uses.setdefault(access.key, []).append((access.position, order))
    return uses


def accesses_of(plan: ReusePlan, seconds: Callable[[CacheKey], float]) -> list[Access]:
    """A reuse plan's writes and reads in order; `seconds` is the time that an entry takes to compute."""
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
    """Let a store serve the accesses one by one.

    Nothing is prefetched, so `stall_seconds` is the time that prefetch has to hide, not what is left of it.

    Args:
        accesses: In order; positions never decrease.
        tiers: Name and budget in bytes, fastest first; None for no bound.
        eviction: As for `TieredStore`; the accesses are its plan.
        rates: Bytes per second from one tier to another; a missing pair takes no time.
    """
    papers = [_Paper(name) for name, _ in tiers]
    store = TieredStore([(paper, budget) for paper, (_, budget) in zip(papers, tiers, strict=True)], eviction=eviction)
    store.follow(uses_of(accesses))
    result = Simulated(bound_seconds=offline_bound(accesses, _total([budget for _, budget in tiers])))
    position = 0
    for access in accesses:
        if access.position > position:
            position = access.position
            store.advance(position)
        tier = None if access.write else store.tier_of(access.key)
        if not access.write:
            store.get(access.key)
            result.reads += 1
        if tier is not None:
            rate = (rates or {}).get((tier, tiers[0][0]))
            result.hits[tier] += 1
            result.stall_seconds += access.size / rate if rate else 0.0
            result.saved_seconds += access.seconds
        else:
            result.recompute_seconds += 0.0 if access.write else access.seconds
            store.put(access.key, _Sized(access.size))  # type: ignore[arg-type]
    result.bytes_written.update({paper.tier: paper.written for paper in papers})
    return result


def offline_bound(accesses: Sequence[Access], capacity: float) -> float:
    """An upper bound of the seconds of computing that any tiers with `capacity` bytes save, all accesses being known.

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


@dataclass(frozen=True)
class _Sized:
    """In place of a tensor."""

    nbytes: int
    dtype: Any = None
    device: Any = None


class _Paper:
    """In place of a store."""

    def __init__(self, name: str) -> None:
        self.tier, self.written = name, 0
        self._sizes: dict[Key, Any] = {}

    def put(self, key: Key, tensor: Any) -> None:
        self._sizes[key] = tensor
        self.written += tensor.nbytes

    def get(self, key: Key) -> Any:
        return self._sizes.get(key)

    def prefetch(self, keys: object) -> None: ...

    def drop(self, key: Key) -> None:
        self._sizes.pop(key, None)

    def clear(self) -> None:
        self._sizes.clear()
