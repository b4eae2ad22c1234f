"""The eviction order of a `TieredStore`: the least recently used first, or what another package registers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from edit_ray.registry import Registry
from edit_ray.tiers.reuse_plan import Key

Order = tuple[float, ...]


class EvictionPolicy(ABC):
    """Ranks entries whenever room is needed. An object serves one store.

    Other packages register theirs in the entry-point group `edit_ray.eviction`.
    """

    @abstractmethod
    def order(self, key: Key) -> Order:
        """The smallest is evicted first. Of one length for all keys; no two keys should be equal."""

    @abstractmethod
    def touch(self, key: Key) -> None:
        """The entry was written, or prefetched."""

    @abstractmethod
    def read(self, key: Key) -> None:
        """The entry was read, found or not."""

    @abstractmethod
    def forget(self, key: Key) -> None:
        """No tier holds the entry any more."""


EVICTIONS: Registry[EvictionPolicy] = Registry("eviction policy", "edit_ray.eviction")


@EVICTIONS.register("lru")
class LRU(EvictionPolicy):
    """The least recently used is evicted first."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[Key, int] = {}

    def order(self, key: Key) -> Order:
        return (self._last[key],)

    def touch(self, key: Key) -> None:
        self._clock += 1
        self._last[key] = self._clock

    def read(self, key: Key) -> None:
        if key in self._last:
            self.touch(key)

    def forget(self, key: Key) -> None:
        self._last.pop(key, None)
