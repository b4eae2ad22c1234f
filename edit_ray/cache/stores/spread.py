"""Stores for a loop that reads all residuals in every step: in pinned memory all of them, or a fixed fraction."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_ray.cache.stores.base import CacheStore, HeldTensors, Keys
from edit_ray.cache.stores.memory import GPUStore
from edit_ray.tiers.reuse_plan import Key, check_key
from edit_ray.tiers.transfers import Copy, HostCopies, Loaded, copies_for


@dataclass(slots=True, eq=False)
class _Place:
    """Host memory of one entry, and its copies in flight. The memory of a dropped entry is reused."""

    memory: Tensor
    device: torch.device
    leaving: Copy | None = None
    loading: Copy | None = None

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def settle(self) -> None:
        """Wait for the copies in flight."""
        for copy in (self.leaving, self.loading):
            if copy is not None:
                copy.wait()
        self.leaving = self.loading = None

    @property
    def settled(self) -> bool:
        """Whether no copy is in flight."""
        return all(copy is None or copy.done() for copy in (self.leaving, self.loading))


class PinnedStore(HeldTensors[_Place]):
    """A `CacheStore` in host memory, without a bound; `get` returns an entry on the device from which it was put.

    When an entry is read again, those that were read after it the last time are loaded ahead, `ahead` entries deep: a
    loop that reads the same in every step finds them loaded. At most `ahead` writes are in flight, and twice as many
    reads that the device has not reached; a caller that is further ahead of the device waits.
    """

    tier = "host"

    def __init__(self, ahead: int = 4) -> None:
        """Raises ValueError: `ahead` is below 1."""
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; it must be a whole number from 1.")
        super().__init__()
        self._most = ahead
        self._free: dict[tuple[torch.dtype, torch.Size], list[_Place]] = {}
        self._copies: dict[torch.device, HostCopies] = {}
        self._loaded: dict[Key, Loaded] = {}  # begun, and not asked for yet
        self._then: dict[Key, Key] = {}  # the entry that was read after this one
        self._last: Key | None = None
        self._leaving: deque[_Place] = deque()
        self._loading: deque[_Place] = deque()
        self._asked: deque[torch.cuda.Event] = deque()  # of the last reads, to know which the device has reached

    def put(self, key: Key, tensor: Tensor) -> None:
        check_key(key)
        self.drop(key)
        whole = tensor.detach().contiguous()
        copies = self._copies_of(whole.device)
        place = self._entries[key] = self._place_for(whole)
        place.leaving = copies.out(copies.take(whole), place.memory)
        self.bytes_resident += whole.nbytes
        self._leaving.append(place)
        self._let_go(self._leaving, self._most)

    def get(self, key: Key) -> Tensor | None:
        if key not in self._entries:
            return None
        if self._last is not None:
            self._then[self._last] = key
        self._last = key
        device = self._entries[key].device
        self._wait_for(device)
        loaded = self._loaded.pop(key, None) or self._load(key)
        following: Key | None = key
        for _ in range(self._most):
            following = None if following is None else self._then.get(following)
            if following is None or following not in self._entries:
                break
            if following not in self._loaded and following != key and len(self._loaded) < self._most:
                self._loaded[following] = self._load(following)
        return self._copies_of(device).use(loaded)

    def drop(self, key: Key) -> None:
        self._loaded.pop(key, None)
        self._then.pop(key, None)
        if (place := self._entries.get(key)) is not None:
            self._free.setdefault((place.memory.dtype, place.memory.shape), []).append(place)
        super().drop(key)

    def clear(self) -> None:
        for key in list(self._entries):
            self.drop(key)
        self._last = None
        self._asked.clear()
        for in_flight in (self._leaving, self._loading):
            self._let_go(in_flight, 0)

    def _copies_of(self, device: torch.device) -> HostCopies:
        if device not in self._copies:
            self._copies[device] = copies_for(device)
        return self._copies[device]

    def _place_for(self, tensor: Tensor) -> _Place:
        free = self._free.get((tensor.dtype, tensor.shape))
        if free:
            place = free.pop(0)  # the one that was freed first: its copies have ended, if any have
            place.settle()
            place.device = tensor.device
            return place
        pinned = tensor.device.type == "cuda"
        return _Place(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned), tensor.device)

    def _let_go(self, in_flight: deque[_Place], most: int) -> None:
        """A copy keeps its tensor on the device: few copies are kept, and none that has ended."""
        while in_flight and (len(in_flight) > most or in_flight[0].settled):
            in_flight.popleft().settle()

    def _load(self, key: Key) -> Loaded:
        place = self._entries[key]
        if place.leaving is not None:
            place.leaving.wait()
            place.leaving = None
        loaded = self._copies_of(place.device).load(place.memory)
        place.loading = loaded.copy
        self._loading.append(place)
        self._let_go(self._loading, self._most)
        return loaded

    def _wait_for(self, device: torch.device) -> None:
        """Bound how far the device is behind: reads that it has not reached hold their memory."""
        if device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        self._asked.append(event)
        if len(self._asked) > 2 * self._most:
            self._asked.popleft().synchronize()


class SpreadStore:
    """A `CacheStore` that keeps the residuals of a fixed fraction of the units in host memory, evenly spread.

    Where each step reads everything, as forecasting does, an LRU store moves every entry in every step. Here a unit's
    residuals stay in one tier, and those on the host are loaded while the units between compute. Not thread-safe.

    Examples:
        >>> pipe.enable_cache("taylorseer", 50, "per_block", SpreadStore(host_share=0.25), max_order=2)
    """

    def __init__(self, host_share: float, *, ahead: int = 4) -> None:
        """
        Args:
            host_share: The fraction of the units whose residuals are on the host, from 0 to 1.
            ahead: The number of entries in flight in each direction.

        Raises:
            ValueError: one of them is not valid.
        """
        if not 0 <= host_share <= 1:
            raise ValueError(f"host_share is {host_share}; it must be a number from 0 to 1.")
        self.host_share = host_share
        self._device, self._host = GPUStore(), PinnedStore(ahead)
        self._home: dict[Key, GPUStore | PinnedStore] = {}  # by expert, branch and unit

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes in each tier, by its name."""
        return {store.tier: store.bytes_resident for store in (self._device, self._host)}

    def tier_of(self, key: Key) -> str | None:
        """The name of the tier that holds an entry, None if none does."""
        return next((store.tier for store in (self._device, self._host) if key in store.sizes()), None)

    def put(self, key: Key, tensor: Tensor) -> None:
        self._home_of(key).put(key, tensor)

    def get(self, key: Key) -> Tensor | None:
        return self._home_of(key).get(key)

    def prefetch(self, keys: Keys) -> None:
        """Does nothing: entries on the host are loaded ahead anyway."""

    def drop(self, key: Key) -> None:
        self._home_of(key).drop(key)

    def clear(self) -> None:
        for store in (self._device, self._host):
            store.clear()

    def _home_of(self, key: Key) -> CacheStore:
        unit, number = key[1:4], len(self._home)
        if unit not in self._home:
            on_host = int((number + 1) * self.host_share) > int(number * self.host_share)
            self._home[unit] = self._host if on_host else self._device
        return self._home[unit]
