"""Keys and values of a causal model's earlier chunks, to see and to edit: a ring on the device, and what left it.

An entry is the K/V of one chunk in one layer, [2, B, tokens, heads, head_dim]: all have one size, known before the
first chunk. A chunk has the same slot in the ring of every layer, and the used slots are the first ones, so that
attention reads them where they are. Attention does not depend on the order of keys, so neither does the slot.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_ray.cache.kv_retention import RetentionPolicy, WindowState
from edit_ray.cache.stores.base import CacheStore
from edit_ray.tiers.reuse_plan import Key

WriteHook = Callable[["KVWrite"], "tuple[Tensor, Tensor] | None"]


@dataclass(frozen=True)
class KVLayout:
    """The sizes of a window: `chunks` places, the current chunk's included, for entries of one shape."""

    num_layers: int
    batch: int
    tokens: int
    heads: int
    head_dim: int
    chunks: int
    dtype: torch.dtype
    device: torch.device

    @property
    def entry_shape(self) -> tuple[int, ...]:
        return 2, self.batch, self.tokens, self.heads, self.head_dim

    @property
    def entry_bytes(self) -> int:
        return 2 * self.batch * self.tokens * self.heads * self.head_dim * self.dtype.itemsize


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
    """The K/V of one stream of chunks: what the next chunk attends to on the device, and old chunks in a store.

    `retention` chooses before each chunk; chunks that it does not choose go to the `store` if it may want them back.
    Keys are kept as the attention writes them: un-rotated, or with `rope: absolute` rotated.
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
    ) -> None:
        self.layout, self.retention, self.sink_chunks, self.store = layout, retention, sink_chunks, store
        self.name = name or uuid.uuid4().hex  # several windows may share a store
        self.current: int | None = None  # the chunk being computed
        self.version = 0  # grows when other chunks are in the window, or their content has changed
        self.finished = False  # whether the current chunk is clean, so that what is written now stays
        self._slots: list[int | None] = [None] * layout.chunks
        self._stored: list[int] = []
        self._summaries: dict[int, Tensor] = {}
        self._hooks: list[WriteHook] = []
        two, batch, *rest = layout.entry_shape
        self._rings = {
            branch: [
                torch.empty(two, batch, layout.chunks, *rest, dtype=layout.dtype, device=layout.device)
                for _ in range(layout.num_layers)
            ]
            for branch in branches
        }

    # To see and to edit.

    @property
    def chunks(self) -> tuple[int, ...]:
        """The finished chunks on the device, from old to new."""
        return tuple(sorted(chunk for chunk in self._slots if chunk is not None and chunk != self.current))

    @property
    def stored(self) -> tuple[int, ...]:
        """The chunks that are in the store alone, from old to new."""
        return tuple(sorted(self._stored))

    def entries(self) -> list[KVEntry]:
        """Every entry: by branch, chunk and layer."""
        size = self.layout.entry_shape, self.layout.entry_bytes
        where = [(chunk, "device") for chunk in self.chunks]
        where += [(chunk, getattr(self.store, "tier", type(self.store).__name__)) for chunk in self.stored]
        return [
            KVEntry(branch, layer, chunk, self._tier_of(self._key(branch, chunk, layer), tier), *size)
            for branch in self._rings
            for chunk, tier in sorted(where)
            for layer in range(self.layout.num_layers)
        ]

    @property
    def device_bytes(self) -> int:
        """Bytes of the rings, used or not."""
        return sum(ring.nbytes for rings in self._rings.values() for ring in rings)

    def get(self, chunk: int, layer: int, branch: str = "cond") -> Tensor | None:
        """A copy of an entry [2, B, tokens, heads, head_dim]; None if the store has lost it."""
        if chunk in self._stored:
            assert self.store is not None
            found = self.store.get(self._key(branch, chunk, layer))
            return None if found is None else found.clone()
        return self._entry(chunk, layer, branch).clone()

    def replace(
        self, chunk: int, layer: int, key: Tensor | None = None, value: Tensor | None = None, branch: str = "cond"
    ) -> None:
        """Put other keys or values [B, tokens, heads, head_dim] in the place of a chunk's on the device.

        Raises:
            LookupError: the chunk is not on the device, or the model has no such layer or branch.
            ValueError: their shape, dtype or device is not that of the window.
        """
        entry = self._entry(chunk, layer, branch)
        for half, (name, given) in zip(entry, (("key", key), ("value", value)), strict=True):
            if given is not None:
                half.copy_(self._checked(given, name))
        self.version += 1

    def drop(self, chunk: int) -> None:
        """Forget a chunk, on the device or in the store. Raises LookupError if it is in neither."""
        if chunk in self._stored:
            self._forget_stored(chunk)
        elif chunk in self.chunks:
            self._free(self._slots.index(chunk))
        else:
            raise LookupError(f"There is no chunk {chunk}; there are {[*self.chunks, *self.stored]}.")
        self._summaries.pop(chunk, None)

    def clear(self) -> None:
        """Forget every chunk."""
        for chunk in (*self.chunks, *self.stored):
            self.drop(chunk)

    def free(self) -> None:
        """Forget every chunk, and free the rings; the window cannot be used again."""
        self.clear()
        self._rings.clear()

    def on_write(self, hook: WriteHook) -> Callable[[], None]:
        """Call `hook` with what each layer of a finished chunk writes; returns a function that removes it.

        The hook may return other keys and values of the same shape, dtype and device.
        """
        self._hooks.append(hook)
        return lambda: self._hooks.remove(hook)

    # Called by the attention.

    def begin(self, chunk: int) -> None:
        """Take a slot for a chunk, once retention has chosen what else is in the window."""
        self.abandon()
        places = self.layout.chunks - 1
        state = WindowState(chunk, self.chunks, self.stored, places, self.sink_chunks, self._summaries)
        chosen = tuple(self.retention.select(state))
        known = {*state.held, *state.stored}
        if len(set(chosen)) != len(chosen) or not known.issuperset(chosen) or len(chosen) > places:
            name = type(self.retention).__name__
            raise ValueError(f"{name} chose the chunks {list(chosen)}; valid are at most {places} of {sorted(known)}.")
        for gone in [held for held in state.held if held not in chosen]:
            self._spill(gone)
        for wanted in [stored for stored in state.stored if stored in chosen]:
            self._load(wanted)
        while len(self._stored) > self.retention.stored_chunks:
            self.drop(min(self._stored))
        self._slots[self._slots.index(None)] = self.current = chunk  # mostly that of the one that left: nothing moves
        self._compact()
        self.version += 1

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
        entry = self._entry(self.current, layer, branch)
        entry[0].copy_(key)
        entry[1].copy_(value)
        return edited

    def window(self, branch: str, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, slots, tokens, heads, head_dim] of all that is attended to, by slot, as views."""
        ring = self._rings[branch][layer][:, :, : len(self.order)]
        return ring[0], ring[1]

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
        if self.retention.stored_chunks:
            branch = next(iter(self._rings))
            keys = self._entry(self.current, self.layout.num_layers // 2, branch)[0]
            self._summaries[self.current] = keys.float().mean(dim=(0, 1)).flatten().cpu()
        self.current, self.finished = None, False

    def abandon(self) -> None:
        """Drop the current chunk if it was not completed, and free its slot."""
        self.finished = False
        if self.current is not None:
            slot, self.current = self.slot, None
            self._free(slot)

    def _slot_of(self, chunk: int) -> int:
        if chunk not in self.chunks and chunk != self.current:
            raise LookupError(f"There is no chunk {chunk} on the device; there are {list(self.chunks)}.")
        return self._slots.index(chunk)

    def _entry(self, chunk: int, layer: int, branch: str) -> Tensor:
        if branch not in self._rings or not 0 <= layer < self.layout.num_layers:
            raise LookupError(
                f"There is no layer {layer} of the branch {branch!r}; there are layers 0 to "
                f"{self.layout.num_layers - 1} of {', '.join(self._rings)}."
            )
        return self._rings[branch][layer][:, :, self._slot_of(chunk)]

    def _checked(self, given: object, name: str) -> Tensor:
        shape, layout = list(self.layout.entry_shape[1:]), self.layout
        valid = f"a tensor {shape} of {layout.dtype} on {layout.device}"
        if not isinstance(given, Tensor):
            raise TypeError(f"The {name} is {type(given).__name__}; valid is {valid}.")
        if (list(given.shape), given.dtype, given.device) != (shape, layout.dtype, layout.device):
            raise ValueError(
                f"The {name} is a tensor {list(given.shape)} of {given.dtype} on {given.device}; valid is {valid}."
            )
        return given

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._compact()
        self.version += 1

    def _compact(self) -> None:
        """Move the last used slots into holes before them, so that the used ones are the first."""
        while None in self._slots[: len(self.order)]:
            hole, last = self._slots.index(None), max(i for i, chunk in enumerate(self._slots) if chunk is not None)
            for rings in self._rings.values():
                for ring in rings:
                    ring[:, :, hole].copy_(ring[:, :, last])
            self._slots[hole], self._slots[last] = self._slots[last], None

    def _spill(self, chunk: int) -> None:
        """Move a chunk to the store, or forget it; its slot becomes a hole."""
        if self.store is not None and self.retention.stored_chunks:
            for branch, layer in self._parts():
                self.store.put(self._key(branch, chunk, layer), self._entry(chunk, layer, branch).clone())
            self._stored.append(chunk)
        else:
            self._summaries.pop(chunk, None)
        self._slots[self._slots.index(chunk)] = None

    def _load(self, chunk: int) -> None:
        """Bring a chunk back from the store, or forget it if the store has lost part of it."""
        assert self.store is not None
        keys = [self._key(branch, chunk, layer) for branch, layer in self._parts()]
        self.store.prefetch(keys)
        found = [self.store.get(key) for key in keys]
        self._forget_stored(chunk)
        if any(each is None for each in found):
            self._summaries.pop(chunk, None)
            return
        self._slots[self._slots.index(None)] = chunk
        for (branch, layer), each in zip(self._parts(), found, strict=True):
            assert each is not None
            self._entry(chunk, layer, branch).copy_(each)

    def _forget_stored(self, chunk: int) -> None:
        assert self.store is not None
        self._stored.remove(chunk)
        for branch, layer in self._parts():
            self.store.drop(self._key(branch, chunk, layer))

    def _parts(self) -> Iterator[tuple[str, int]]:
        return ((branch, layer) for branch in self._rings for layer in range(self.layout.num_layers))

    def _key(self, branch: str, chunk: int, layer: int) -> Key:
        return (self.name, "kv", branch, chunk, layer)

    def _tier_of(self, key: Key, otherwise: str) -> str:
        tier_of = getattr(self.store, "tier_of", None)
        return str(tier_of(key)) if tier_of is not None and key[3] in self._stored else otherwise
