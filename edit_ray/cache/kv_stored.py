"""Chunks that have left a causal model's window of K/V, and that a store keeps in case they are wanted again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from edit_ray.cache.device_slots import Item
from edit_ray.cache.stores.base import CacheStore
from edit_ray.tiers.reuse_plan import Key


class StoredChunks:
    """The entries of such chunks in a `store`, under the window's `name`; `layers` are (branch, layer).

    `chunks` lists them from old to new.
    """

    def __init__(self, store: CacheStore, name: str, layers: Sequence[Item]) -> None:
        self.store, self.name, self.layers = store, name, list(layers)
        self.chunks: list[int] = []

    def put(self, chunk: int, entry: Callable[[Item], Tensor]) -> None:
        """Keep a chunk; `entry` gives a layer's tensor, which then belongs to the store."""
        for layer in self.layers:
            self.store.put(self._key(chunk, layer), entry(layer))
        self.chunks = sorted((*self.chunks, chunk))

    def take(self, chunk: int) -> dict[Item, Tensor] | None:
        """A chunk's entries by layer, which are in the store no longer; None if it has lost one of them."""
        keys = {layer: self._key(chunk, layer) for layer in self.layers}
        self.store.prefetch(list(keys.values()))
        found = {layer: self.store.get(key) for layer, key in keys.items()}
        self.drop(chunk)
        whole = {layer: entry for layer, entry in found.items() if entry is not None}
        return whole if len(whole) == len(keys) else None

    def get(self, chunk: int, layer: Item) -> Tensor | None:
        """An entry, which may be the store's own; None if it has lost it."""
        return self.store.get(self._key(chunk, layer))

    def drop(self, chunk: int) -> None:
        """Forget a chunk."""
        self.chunks.remove(chunk)
        for layer in self.layers:
            self.store.drop(self._key(chunk, layer))

    def tier(self, chunk: int, layer: Item) -> str:
        """The tier that has an entry, or what kind of store."""
        tier_of = getattr(self.store, "tier_of", None)
        if tier_of is not None:
            return str(tier_of(self._key(chunk, layer)))
        return str(getattr(self.store, "tier", type(self.store).__name__))

    def _key(self, chunk: int, layer: Item) -> Key:
        branch, position = layer
        return (self.name, "kv", branch, chunk, position)
