"""A fixed share of the units on the host, the others on the device: for loops that read all residuals in every step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from edit_ray.cache.stores.device import GPUStore
from edit_ray.cache.stores.pinned import PinnedStore
from edit_ray.cache.stores.store import CacheStore, Key, Keys

Owner = Key  # expert, branch, unit: the middle of a cache's key


class SpreadStore:
    """A `CacheStore` that keeps every so-manieth unit's residuals in host memory, evenly spread, and moves none.

    Where each step reads everything, as forecasting does, going by recency moves every entry in every step. Here a
    unit's residuals have one place, and those on the host come to the device while the units between are at work. Not
    thread-safe: one owner at a time.

    Examples:
        >>> pipe.enable_cache("taylorseer", 50, "per_block", SpreadStore(host_share=0.25), max_order=2)
    """

    def __init__(self, host_share: float, *, ahead: int = 4) -> None:
        """
        Args:
            host_share: How many of the units' residuals are on the host, from 0 to 1.
            ahead: How many entries are on their way at a time in each direction.

        Raises:
            ValueError: one of them is not valid.
        """
        if not 0 <= host_share <= 1:
            raise ValueError(f"host_share is {host_share}; valid is a number from 0 to 1.")
        self.host_share = host_share
        self._device, self._host = GPUStore(), PinnedStore(ahead)
        self._home: dict[Owner, GPUStore | PinnedStore] = {}

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
        """Nothing to do: what is on the host comes ahead by itself."""

    def drop(self, key: Key) -> None:
        self._home_of(key).drop(key)

    def drop_where(self, condition: Callable[[Key], bool]) -> None:
        for store in (self._device, self._host):
            store.drop_where(condition)

    def clear(self) -> None:
        self.drop_where(lambda key: True)

    def _home_of(self, key: Key) -> CacheStore:
        owner = key[1:4]
        if owner not in self._home:
            number = len(self._home)
            on_host = int((number + 1) * self.host_share) > int(number * self.host_share)
            self._home[owner] = self._host if on_host else self._device
        return self._home[owner]
