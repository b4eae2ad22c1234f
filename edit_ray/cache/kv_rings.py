"""The memory of a causal model's K/V: a ring for each layer, on the device or in host memory.

An entry is the K/V of one chunk in one layer, [2, B, tokens, heads, head_dim]: all have one size, known before the
first chunk. A ring has a slot for each chunk of the window, and a chunk has the same slot in the ring of every layer.

In the steps of a chunk only its own slot changes. So a layer whose ring is in host memory needs the other slots copied
to the device in each forward, and its own slot copied back once, when the chunk is clean.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_ray.cache.device_slots import AHEAD, CopyStream, DeviceSlots, HostMemory, Item
from edit_ray.errors import HostMemoryShort


@dataclass(frozen=True)
class KVLayout:
    """The sizes of a window: `chunks` places, the current chunk's included, for entries of one shape.

    With `rotated_keys` each layer has a second ring besides, for its keys as they are attended to.
    """

    num_layers: int
    batch: int
    tokens: int
    heads: int
    head_dim: int
    chunks: int
    dtype: torch.dtype
    device: torch.device
    rotated_keys: bool = False

    @property
    def entry_shape(self) -> tuple[int, ...]:
        return 2, self.batch, self.tokens, self.heads, self.head_dim

    @property
    def entry_bytes(self) -> int:
        return math.prod(self.entry_shape) * self.dtype.itemsize

    @property
    def ring_shape(self) -> tuple[int, ...]:
        return 2, self.batch, self.chunks, self.tokens, self.heads, self.head_dim

    @property
    def ring_bytes(self) -> int:
        return self.entry_bytes * self.chunks

    @property
    def rotated_bytes(self) -> int:
        return self.ring_bytes // 2 if self.rotated_keys else 0


@dataclass(frozen=True)
class RingPlacement:
    """The layers whose rings stay on the device, those whose rings are in host memory, and the buffers that these use.

    A layer is named by its branch and number. Layers in host memory share one ring of rotated keys as well.
    """

    resident: tuple[Item, ...]
    streamed: tuple[Item, ...]
    buffers: int


def place_rings(layers: Sequence[Item], ring_bytes: int, rotated_bytes: int, device_bytes: int | None) -> RingPlacement:
    """Place as many rings on the device as `device_bytes` allow; None is no bound.

    Those in host memory are spread evenly over the `layers`, which are in the order of use: while one is copied, others
    compute. The first one stays on the device, as nothing computes before it.

    Raises:
        ValueError: `device_bytes` is no number of bytes, or has no place for the buffers.
    """
    each = ring_bytes + rotated_bytes
    whole, buffers = len(layers) * each, (AHEAD + 1) * ring_bytes + rotated_bytes
    least = min(whole, buffers)
    if device_bytes is None:
        device_bytes = whole
    if not isinstance(device_bytes, int) or isinstance(device_bytes, bool) or device_bytes < least:
        raise ValueError(
            f"kv_device_bytes is {device_bytes!r}; it must be a whole number of bytes from {least}, for the layers "
            f"that are copied ahead; the K/V of all {len(layers)} takes {whole}."
        )
    if device_bytes >= whole:
        return RingPlacement(tuple(layers), (), 0)
    count = len(layers) - (device_bytes - buffers) // each
    streamed = [(index + 1) * count // len(layers) > index * count // len(layers) for index in range(len(layers))]
    return RingPlacement(
        tuple(layer for layer, host in zip(layers, streamed, strict=True) if not host),
        tuple(layer for layer, host in zip(layers, streamed, strict=True) if host),
        AHEAD + 1,
    )


class KVRings:
    """The rings [2, B, chunks, tokens, heads, head_dim] of a window's layers.

    `device_bytes` bounds what they take on the device. Layers beyond it are in host memory, and in a few buffers on the
    device while they are attended to: `loaded_bytes` and `written_bytes` count what was copied there and back.

    Raises:
        ValueError: `device_bytes` is too small.
        HostMemoryShort: the node has too little memory for the others.
    """

    def __init__(self, layout: KVLayout, branches: Sequence[str], device_bytes: int | None = None) -> None:
        self.layout = layout
        self.layers: list[Item] = [(branch, layer) for branch in branches for layer in range(layout.num_layers)]
        self.placement = place_rings(self.layers, layout.ring_bytes, layout.rotated_bytes, device_bytes)
        self.loaded_bytes = self.written_bytes = 0
        self.parked = False
        self._copies = CopyStream(layout.device)
        self._marked, self._written, self._moved = (self._copies.event() for _ in range(3))
        self._finished: list[range] = []  # the slots of finished chunks
        self._memory: list[HostMemory] = []
        self._host = self._in_host_memory(self.placement.streamed)
        self._parked: dict[Item, Tensor] = {}  # places for the resident rings, once they have been parked
        self._held: tuple[Item, int] | None = None  # the streamed layer that is used now, and its buffer
        self._slots: DeviceSlots
        self._allocate()

    @property
    def device_bytes(self) -> int:
        """Bytes of all rings and buffers on the device, used or not."""
        made = [*self._resident.values(), *self._buffers, *self._rotated.values()]
        return sum(tensor.nbytes for tensor in made)

    def tier(self, layer: Item) -> str:
        """Where a layer's ring is: `device` or `host`."""
        return "device" if layer in self._resident else "host"

    def ring(self, layer: Item) -> Tensor:
        """A layer's ring where it is, to be read and edited now; `changed` must follow what is written."""
        if layer in self._resident:
            self._copies.wait(self._moved)
            return self._resident[layer]
        self._copies.synchronise()
        return self._host[layer] if layer in self._host else self._parked[layer]

    # While a chunk is computed.

    def begin_chunk(self, finished: Sequence[range], forwards: int) -> None:
        """Begin the copies for so many forwards, which attend to the slots of `finished` chunks and to their own."""
        self._copies.wait(self._moved)
        self._finished = list(finished)
        self._slots.forget()
        self._slots.begin_loop(self.placement.streamed * forwards)

    def changed(self, finished: Sequence[range]) -> None:
        """Copy again what is used from now on: other chunks are finished, or their content has changed."""
        self._finished = list(finished)
        self._release()
        self._slots.forget()

    def end_chunk(self) -> None:
        """No further forwards follow."""
        self._release()
        self._slots.begin_loop(())

    def use(self, layer: Item) -> Tensor:
        """A layer's ring on the device, for what is computed until the next layer's is asked for."""
        if layer in self._resident:
            return self._resident[layer]
        if self._held is None or self._held[0] != layer:
            self._release()
            self._held = layer, self._slots.acquire(layer)
        return self._buffers[self._held[1]]

    def keep(self, layer: Item, slot: int) -> None:
        """Copy a slot that `use` has given, and that is clean now, to where the ring is."""
        if layer in self._resident:
            return
        source = self.use(layer)
        self._copies.mark(self._marked)
        with self._copies.copies(after=self._marked, done=self._written):
            self.written_bytes += _copy_slots(source, self._host[layer], [range(slot, slot + 1)])

    def rotated(self, layer: Item, version: int) -> tuple[Tensor, bool]:
        """The ring [B, chunks, tokens, heads, head_dim] for a layer's rotated keys; and whether it has this version's.

        If it has not, the caller writes them.
        """
        place = layer if layer in self._resident else None
        known = self._rotated_for.get(place) == (layer, version)
        self._rotated_for[place] = layer, version
        return self._rotated[place], known

    # Between two chunks.

    def park(self, finished: Sequence[range]) -> None:
        """Copy the resident rings' slots to host memory, and free all on the device. Raises HostMemoryShort."""
        if self.parked:
            return
        if not self._parked:
            self._parked = self._in_host_memory(self.placement.resident)
        self._move(self._resident, self._parked, finished)
        self._copies.synchronise()
        self._drop_device()
        self.parked = True

    def unpark(self, finished: Sequence[range]) -> None:
        """Allocate all on the device again, and begin to copy the slots there: other streams may compute meanwhile."""
        if not self.parked:
            return
        self._allocate()
        self.parked = False
        self._move(self._parked, self._resident, finished)

    def free(self) -> None:
        """Free all, for good."""
        self._copies.synchronise()
        self._drop_device()
        self._host.clear()
        self._parked.clear()
        self._memory.clear()
        self.layers, self.parked = [], False

    def _move(self, source: Mapping[Item, Tensor], target: Mapping[Item, Tensor], slots: Sequence[range]) -> None:
        self._copies.mark(self._marked)
        with self._copies.copies(after=self._marked, done=self._moved):
            for layer in self.placement.resident:
                _copy_slots(source[layer], target[layer], slots)

    def _allocate(self) -> None:
        layout, placement = self.layout, self.placement

        def ring(shape: Sequence[int]) -> Tensor:
            made = torch.empty(*shape, dtype=layout.dtype, device=layout.device)
            self._copies.reads(made)
            return made

        resident = {layer: ring(layout.ring_shape) for layer in placement.resident}
        buffers = [ring(layout.ring_shape) for _ in range(placement.buffers)]
        places: list[Item | None] = [*placement.resident, *([None] if placement.streamed else [])]
        rotated = {place: ring(layout.ring_shape[1:]) for place in places if layout.rotated_keys}
        self._resident, self._buffers, self._rotated = resident, buffers, rotated
        self._rotated_for: dict[Item | None, tuple[Item, int]] = {}
        rings = weakref.proxy(self)  # a cycle would keep the memory of a stream that nobody has any more
        self._slots = DeviceSlots(
            placement.streamed, placement.buffers, self._copies, lambda layer, buffer: rings._load(layer, buffer)
        )

    def _drop_device(self) -> None:
        self._resident, self._buffers, self._rotated, self._held = {}, [], {}, None

    def _in_host_memory(self, layers: Sequence[Item]) -> dict[Item, Tensor]:
        layout, size = self.layout, len(layers) * self.layout.ring_bytes
        if not size:
            return {}
        try:
            memory = HostMemory(size, layout.device)
        except HostMemoryShort:
            raise HostMemoryShort(
                f"{size} bytes of K/V do not fit into this node's memory; a smaller window or batch needs less."
            ) from None
        self._memory.append(memory)
        rings = memory.bytes.view(layout.dtype).view(len(layers), *layout.ring_shape)
        return dict(zip(layers, rings, strict=True))

    def _load(self, layer: Item, buffer: int) -> None:
        self.loaded_bytes += _copy_slots(self._host[layer], self._buffers[buffer], self._finished)

    def _release(self) -> None:
        if self._held is not None:
            self._held = None
            self._slots.release()


def _copy_slots(source: Tensor, target: Tensor, slots: Iterable[range]) -> int:
    """Copy slots of a ring to another, and return their bytes: in pieces, as a GPU copies only what lies in one."""
    copied = 0
    for each in slots:
        for half, other in zip(source, target, strict=True):
            for ring, place in zip(half, other, strict=True):
                place[each.start : each.stop].copy_(ring[each.start : each.stop], non_blocking=True)
                copied += ring[each.start : each.stop].nbytes
    return copied
