"""Keys and values of a causal model's earlier chunks, to see and to edit: a window of them, and what left it.

The used slots of a ring are the first ones, so that attention reads them where they are. Attention does not depend on
the order of keys, so neither does the slot.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from edit_ray.cache.device_slots import Item
from edit_ray.cache.kv_retention import RetentionPolicy, WindowState
from edit_ray.cache.kv_rings import KVLayout, KVRings
from edit_ray.cache.kv_stored import StoredChunks
from edit_ray.cache.stores.base import CacheStore

WriteHook = Callable[["KVWrite"], "tuple[Tensor, Tensor] | None"]


@dataclass(frozen=True)
class KVEntry:
    """One chunk's keys and values in one layer, and the tier that has them."""

    branch: str
    layer: int
    chunk: int
    tier: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class KVWrite:
    """Keys and values [B, tokens, heads, head_dim] of a finished chunk, as a hook sees them before they are kept."""

    branch: str
    layer: int
    chunk: int
    key: Tensor
    value: Tensor


class KVWindow:
    """The K/V of one stream of chunks: what the next chunk attends to, and old chunks in a store.

    `retention` chooses before each chunk; chunks that it does not choose go to the `store` if it may want them back.
    Keys are kept as the attention writes them: un-rotated, or with `rope: absolute` rotated. `device_bytes` bounds what
    the window takes on the device; the layers beyond it are in host memory (`KVRings`).
    """

    def __init__(
        self,
        layout: KVLayout,
        retention: RetentionPolicy,
        *,
        sink_chunks: int = 0,
        branches: Sequence[str] = ("cond",),
        store: CacheStore | None = None,
        name: str | None = None,
        device_bytes: int | None = None,
    ) -> None:
        self.layout, self.retention, self.sink_chunks, self.store = layout, retention, sink_chunks, store
        self.rings = KVRings(layout, branches, device_bytes)
        self.name = name or uuid.uuid4().hex  # several windows may share a store
        self._old = None if store is None else StoredChunks(store, self.name, self.rings.layers)
        self.current: int | None = None  # the chunk being computed
        self.version = 0  # grows when other chunks are in the window, or their content has changed
        self.finished = False  # whether the current chunk is clean, so that what is written now stays
        self._slots: list[int | None] = [None] * layout.chunks
        self._summaries: dict[int, Tensor] = {}
        self._hooks: list[WriteHook] = []

    # To see and to edit.

    @property
    def chunks(self) -> tuple[int, ...]:
        """The finished chunks in the window, from old to new."""
        return tuple(sorted(chunk for chunk in self._slots if chunk is not None and chunk != self.current))

    @property
    def stored(self) -> tuple[int, ...]:
        """The chunks that are in the store alone, from old to new."""
        return () if self._old is None else tuple(self._old.chunks)

    def entries(self) -> list[KVEntry]:
        """Every entry: by branch, chunk and layer."""
        size = self.layout.entry_shape, self.layout.entry_bytes
        return [
            KVEntry(branch, layer, chunk, self._tier_of(chunk, (branch, layer)), *size)
            for branch in dict(self.rings.layers)
            for chunk in sorted((*self.chunks, *self.stored))
            for layer in range(self.layout.num_layers)
        ]

    @property
    def device_bytes(self) -> int:
        """Bytes that the window takes on the device, used or not; with rotated keys theirs as well."""
        return self.rings.device_bytes

    @property
    def freed(self) -> bool:
        """Whether the window is gone for good."""
        return not self.rings.layers

    def get(self, chunk: int, layer: int, branch: str = "cond") -> Tensor | None:
        """A copy of an entry [2, B, tokens, heads, head_dim] on the device; None if the store has lost it."""
        if self._old is not None and chunk in self._old.chunks:
            found = self._old.get(chunk, (branch, layer))
        else:
            found = self._entry(chunk, layer, branch)
        return None if found is None else found.to(self.layout.device, copy=True)

    def replace(
        self, chunk: int, layer: int, key: Tensor | None = None, value: Tensor | None = None, branch: str = "cond"
    ) -> None:
        """Put other keys or values [B, tokens, heads, head_dim] in the place of a chunk's in the window.

        Raises:
            LookupError: the chunk is not in the window, or the model has no such layer or branch.
            ValueError: their shape, dtype or device is not that of the window.
        """
        entry = self._entry(chunk, layer, branch)
        for half, (name, given) in zip(entry, (("key", key), ("value", value)), strict=True):
            if given is not None:
                half.copy_(self._checked(given, name))
        self._changed()

    def drop(self, chunk: int) -> None:
        """Forget a chunk, in the window or in the store. Raises LookupError if it is in neither."""
        if self._old is not None and chunk in self._old.chunks:
            self._old.drop(chunk)
        elif chunk in self.chunks:
            self._free(self._slots.index(chunk))
        else:
            raise LookupError(f"There is no chunk {chunk}; there are {[*self.chunks, *self.stored]}.")
        self._summaries.pop(chunk, None)

    def clear(self) -> None:
        """Forget every chunk."""
        last_first = sorted(self.chunks, key=self._slots.index, reverse=True)  # so that nothing moves into holes
        for chunk in (*last_first, *self.stored):
            self.drop(chunk)

    def restore(self, order: Sequence[int], entries: Iterable[tuple[int, Item, Tensor]]) -> None:
        """Hold the chunks of another window: which by slot, and entries of all of them, by chunk and layer."""
        self.clear()
        self._slots[: len(order)] = order
        for chunk, (branch, layer), entry in entries:
            self._entry(chunk, layer, branch).copy_(entry)
        self._changed()

    def free(self) -> None:
        """Forget every chunk, and free the memory; the window cannot be used again."""
        self.clear()
        self.rings.free()

    def park(self) -> None:
        """Move the window to host memory, exactly, and free its memory on the device, until the next chunk or `unpark`.

        The first time takes the host memory, which the window keeps.

        Raises:
            RuntimeError: a chunk is being computed.
            HostMemoryShort: the node has too little memory.
        """
        if self.current is not None:
            raise RuntimeError(f"Chunk {self.current} is being computed; a window is parked between two chunks.")
        if not self.freed:
            self.rings.park(self._finished_slots())

    def unpark(self) -> None:
        """Begin to move a parked window back to the device, beside what is computed next; else do nothing."""
        self.rings.unpark(self._finished_slots())

    def on_write(self, hook: WriteHook) -> Callable[[], None]:
        """Call `hook` with what each layer of a finished chunk writes; returns a function that removes it.

        The hook may return other keys and values of the same shape, dtype and device.
        """
        self._hooks.append(hook)
        return lambda: self._hooks.remove(hook)

    # Called by the attention.

    def begin(self, chunk: int, forwards: int = 1) -> None:
        """Take a slot for a chunk of so many forwards, once retention has chosen what else is in the window."""
        self.abandon()
        self.unpark()
        places = self.layout.chunks - 1
        state = WindowState(chunk, self.chunks, self.stored, places, self.sink_chunks, self._summaries)
        chosen = tuple(self.retention.select(state))
        known = {*state.held, *state.stored}
        if len(set(chosen)) != len(chosen) or not known.issuperset(chosen) or len(chosen) > places:
            name = type(self.retention).__name__
            raise ValueError(
                f"{name} chose the chunks {list(chosen)}; it must choose at most {places} of {sorted(known)}."
            )
        for gone in [held for held in state.held if held not in chosen]:
            self._spill(gone)
        for wanted in [stored for stored in state.stored if stored in chosen]:
            self._load(wanted)
        while len(self.stored) > self.retention.stored_chunks:
            self.drop(self.stored[0])
        self._slots[self._slots.index(None)] = self.current = chunk  # mostly that of the one that left: nothing moves
        self._compact()
        self.version += 1
        self.rings.begin_chunk(self._finished_slots(), forwards)

    def write(self, branch: str, layer: int, key: Tensor, value: Tensor) -> bool:
        """Write what the current chunk's forward has computed, [B, tokens, heads, head_dim] each.

        Returns whether a hook has changed it.
        """
        assert self.current is not None, "a chunk has begun"
        edited = False
        if self.finished:
            for hook in list(self._hooks):
                answer = hook(KVWrite(branch, layer, self.current, key, value))
                if answer is not None:
                    edited = True
                    key, value = (self._checked(a, b) for a, b in zip(answer, ("key", "value"), strict=True))
        entry = self.rings.use((branch, layer))[:, :, self.slot]
        entry[0].copy_(key)
        entry[1].copy_(value)
        if self.finished:
            self.rings.keep((branch, layer), self.slot)
        return edited

    def window(self, branch: str, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, slots, tokens, heads, head_dim] of all that is attended to, by slot, as views."""
        ring = self.rings.use((branch, layer))[:, :, : len(self.order)]
        return ring[0], ring[1]

    def rotated(self, branch: str, layer: int) -> tuple[Tensor, bool]:
        """A place [B, slots, tokens, heads, head_dim] for the rotated keys, by slot; and whether those of earlier
        chunks are there, as this `version` of the window has them. If not, the caller writes them.
        """
        ring, known = self.rings.rotated((branch, layer), self.version)
        return ring[:, : len(self.order)], known

    @property
    def order(self) -> tuple[int, ...]:
        """The chunks of the used slots, by slot."""
        return tuple(chunk for chunk in self._slots if chunk is not None)

    @property
    def slot(self) -> int:
        """The slot of the current chunk."""
        return self._slots.index(self.current)

    def complete(self) -> None:
        """The current chunk is clean and belongs to the window."""
        assert self.current is not None, "a chunk has begun"
        assert self.finished, "the clean chunk has been written"
        chunk, self.current, self.finished = self.current, None, False
        self.rings.end_chunk()
        if self.retention.stored_chunks:
            branch, _ = self.rings.layers[0]
            entry = self.get(chunk, self.layout.num_layers // 2, branch)
            assert entry is not None, "it is in the window"
            self._summaries[chunk] = entry[0].float().mean(dim=(0, 1)).flatten().cpu()

    def abandon(self) -> None:
        """Drop the current chunk if it was not completed, and free its slot."""
        self.finished = False
        if self.current is not None:
            slot, self.current = self.slot, None
            self.rings.end_chunk()
            self._free(slot)

    def _entry(self, chunk: int, layer: int, branch: str) -> Tensor:
        if (branch, layer) not in self.rings.layers:
            raise LookupError(
                f"There is no layer {layer} of the branch {branch!r}; there are layers 0 to "
                f"{self.layout.num_layers - 1} of {', '.join(dict(self.rings.layers))}."
            )
        if chunk not in self.chunks:
            raise LookupError(f"There is no chunk {chunk} in the window; there are {list(self.chunks)}.")
        return self.rings.ring((branch, layer))[:, :, self._slots.index(chunk)]

    def _checked(self, given: object, name: str) -> Tensor:
        shape, layout = list(self.layout.entry_shape[1:]), self.layout
        valid = f"a tensor {shape} of {layout.dtype} on {layout.device}"
        if not isinstance(given, Tensor):
            raise TypeError(f"The {name} is {type(given).__name__}; it must be {valid}.")
        if (list(given.shape), given.dtype, given.device) != (shape, layout.dtype, layout.device):
            raise ValueError(
                f"The {name} is a tensor {list(given.shape)} of {given.dtype} on {given.device}; it must be {valid}."
            )
        return given

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._compact()
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.rings.changed(self._finished_slots())

    def _finished_slots(self) -> list[range]:
        """The slots of the finished chunks."""
        used = range(len(self.order))
        return [used] if self.current is None else [used[: self.slot], used[self.slot + 1 :]]

    def _compact(self) -> None:
        """Move the last used slots into holes before them, so that the used ones are the first."""
        while None in self._slots[: len(self.order)]:
            hole, last = self._slots.index(None), max(i for i, chunk in enumerate(self._slots) if chunk is not None)
            for layer in self.rings.layers:
                ring = self.rings.ring(layer)
                ring[:, :, hole].copy_(ring[:, :, last])
            self._slots[hole], self._slots[last] = self._slots[last], None

    def _spill(self, chunk: int) -> None:
        """Move a chunk to the store, or forget it; its slot becomes a hole."""
        if self._old is not None and self.retention.stored_chunks:
            self._old.put(chunk, lambda layer: self._entry(chunk, layer[1], layer[0]).clone())
        else:
            self._summaries.pop(chunk, None)
        self._slots[self._slots.index(chunk)] = None

    def _load(self, chunk: int) -> None:
        """Bring a chunk back from the store, or forget it if the store has lost part of it."""
        found = None if self._old is None else self._old.take(chunk)
        if found is None:
            self._summaries.pop(chunk, None)
            return
        self._slots[self._slots.index(None)] = chunk
        for (branch, layer), each in found.items():
            self._entry(chunk, layer, branch).copy_(each)

    def _tier_of(self, chunk: int, layer: Item) -> str:
        if self._old is not None and chunk in self._old.chunks:
            return self._old.tier(chunk, layer)
        return self.rings.tier(layer)
