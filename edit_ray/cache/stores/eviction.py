"""Eviction order: the least recently used first, or by a reuse plan the entry read furthest in the future."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import deque
from collections.abc import Collection

from edit_ray.registry import Registry
from edit_ray.tiers.reuse_plan import Key, Uses

Order = tuple[float, ...]


class EvictionPolicy(ABC):
    """Ranks entries. The order of a key may change when the key is touched or read, and by `follow` and `advance`.

    An object serves one store. Other packages register theirs in the entry-point group `edit_ray.eviction`.
    """

    @abstractmethod
    def order(self, key: Key) -> Order:
        """The smallest is evicted first. Of one length for all keys; no two keys should be equal."""

    @abstractmethod
    def touch(self, key: Key) -> None:
        """The entry was written, or prefetched."""

    @abstractmethod
    def read(self, key: Key) -> bool:
        """The entry was read, found or not. True if the order of other keys has changed by it."""

    @abstractmethod
    def forget(self, key: Key) -> None:
        """No tier holds the entry any more."""

    def dead(self, key: Key) -> bool:
        """Whether it is known that nobody will read the entry again: it is dropped instead of spilled."""
        return False

    def follow(self, uses: Uses) -> None:  # noqa: B027 - most have no use for a plan
        """A new reuse plan; the order of every key may have changed."""

    def advance(self, position: int) -> Collection[Key]:
        """Reads planned before `position` are past; returns the keys whose order has changed by it."""
        return ()


EVICTIONS: Registry[EvictionPolicy] = Registry("eviction policy", "edit_ray.eviction")


def make_eviction(eviction: str | EvictionPolicy) -> EvictionPolicy:
    """The policy of a registered name; an EvictionPolicy is returned as it is.

    Raises:
        ValueError: no eviction policy has this name.
        TypeError: it is neither a name nor an EvictionPolicy.
    """
    if isinstance(eviction, EvictionPolicy):
        return eviction
    if not isinstance(eviction, str):
        valid = ", ".join(EVICTIONS.names())
        raise TypeError(f"eviction is {eviction!r}; valid are {valid}, or an EvictionPolicy object.")
    return EVICTIONS.find(eviction)()


@EVICTIONS.register("lru")
class LRU(EvictionPolicy):
    """The least recently used is evicted first."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def order(self, key: Key) -> Order:
        return (0, self._last[key])

    def touch(self, key: Key) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def read(self, key: Key) -> bool:
        if key in self._last:
            self.touch(key)
        return False

    def forget(self, key: Key) -> None:
        self._last.pop(key, None)


@EVICTIONS.register("furthest_next_use")
class FurthestNextUse(LRU):
    """The entry that the plan reads last is evicted first (Belady 1966), before it unplanned entries by age.

    A planned key that is read at an unplanned position means that the run has left its plan: from then on, until the
    next plan, and also without a plan, this is `LRU`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.position = 0
        self.diverged = False
        self._uses: dict[Key, deque[tuple[int, int]]] = {}
        self._keys_at: dict[int, set[Key]] = {}  # the keys read at a position
        self._positions: list[int] = []

    def order(self, key: Key) -> Order:
        uses = self._uses.get(key)
        if uses is None or self.diverged:
            return (0, self._last[key])
        return (1, -uses[0][1] if uses else float("-inf"))

    def read(self, key: Key) -> bool:
        super().read(key)
        uses = self._uses.get(key)
        if uses is None or self.diverged:
            return False
        if uses and uses[0][0] == self.position:
            uses.popleft()
            return False
        self.diverged = True
        return True

    def dead(self, key: Key) -> bool:
        return not self.diverged and key in self._uses and not self._uses[key]

    def follow(self, uses: Uses) -> None:
        """Follow the uses of each key, in order, from position 0."""
        self.position, self.diverged = 0, False
        self._uses = {key: deque(of_key) for key, of_key in uses.items()}
        self._keys_at = {}
        for key, of_key in uses.items():
            for position, _ in of_key:
                self._keys_at.setdefault(position, set()).add(key)
        self._positions = sorted(self._keys_at)

    def advance(self, position: int) -> Collection[Key]:
        """Move on, never back; planned reads before `position` that were not made are skipped."""
        past = self._positions[: bisect_left(self._positions, position)]
        self._positions = self._positions[len(past) :]
        changed = set[Key]()
        for passed in past:
            for key in self._keys_at.pop(passed):
                uses = self._uses[key]
                while uses and uses[0][0] < position:
                    uses.popleft()
                    changed.add(key)
        self.position = max(self.position, position)
        return changed
