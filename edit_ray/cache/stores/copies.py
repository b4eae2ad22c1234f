"""How bytes go between a segment's device and the arena: at once on the CPU, beside the computation on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Copy(Protocol):
    """Bytes on their way."""

    def done(self) -> bool:
        """Whether they have come."""

    def wait(self) -> None:
        """Return when they have."""


@dataclass(slots=True)
class Taken:
    """A tensor that will be copied out, left alone until then; on a GPU with the moment from which it is whole."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None


@dataclass(slots=True)
class Loaded:
    """A tensor on the device, and the copy that fills it; None for one that was computed there. So many reads will use
    it; `pooled` if it is there in place of one of a pool.
    """

    tensor: Tensor
    copy: Copy | None = None
    pooled: bool = False
    readers: int = 1


class Copies(Protocol):
    """Copies of one device. Places are views of the arena: contiguous tensors on the CPU."""

    def take(self, tensor: Tensor) -> Taken:
        """What is computed so far of a contiguous tensor of the device, to be copied out later."""

    def out(self, taken: Taken, place: Tensor) -> Copy:
        """Copy to a place of the same type and shape."""

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor of the device to be loaded into, by these copies."""

    def load(self, place: Tensor, into: Tensor | None = None) -> Loaded:
        """A tensor of the device with the bytes of a place: `into` from a pool, or a fresh one."""

    def use(self, loaded: Loaded) -> Tensor:
        """The tensor, for what the caller computes from now on."""


class _Done:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return


_DONE = _Done()


class HostCopies:
    """On the CPU every copy is over when its call returns."""

    def take(self, tensor: Tensor) -> Taken:
        return Taken(tensor)

    def out(self, taken: Taken, place: Tensor) -> Copy:
        place.copy_(taken.tensor)
        return _DONE

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def load(self, place: Tensor, into: Tensor | None = None) -> Loaded:
        return Loaded(place.clone() if into is None else into.copy_(place), _DONE, into is not None)

    def use(self, loaded: Loaded) -> Tensor:
        return loaded.tensor


@dataclass(slots=True)
class _OnStream:
    """A copy that a stream makes; what it reads or fills is kept for it."""

    event: torch.cuda.Event
    tensor: Tensor

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class StreamCopies:
    """On a GPU one stream for each direction, so that both ways go at once and neither waits for the computation.

    The call returns at once if the arena is registered with CUDA. The memory of what is loaded is the loading stream's:
    taken from the computing one, it would be free only after everything that was queued there before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: list[torch.cuda.Event] = []  # to be used again: making one takes longer than a copy's start
        self.loading, self.leaving = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def take(self, tensor: Tensor) -> Taken:
        ready = self._ready.pop() if self._ready else torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        return Taken(tensor, ready)

    def out(self, taken: Taken, place: Tensor) -> Copy:
        assert taken.ready is not None
        with self.leaving:
            self.leaving.wait_event(taken.ready)
            place.copy_(taken.tensor, non_blocking=True)
        self._ready.append(taken.ready)
        return self._on_stream(self.leaving, taken.tensor)

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        with self.loading:
            return torch.empty(*shape, dtype=dtype, device=self._device)

    def load(self, place: Tensor, into: Tensor | None = None) -> Loaded:
        with self.loading:
            tensor = place.to(self._device, non_blocking=True) if into is None else into.copy_(place, non_blocking=True)
        return Loaded(tensor, self._on_stream(self.loading, tensor), into is not None)

    def use(self, loaded: Loaded) -> Tensor:
        if isinstance(loaded.copy, _OnStream):
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(loaded.copy.event)
            loaded.tensor.record_stream(computing)
        return loaded.tensor

    def _on_stream(self, stream: torch.cuda.Stream, tensor: Tensor) -> Copy:
        event = torch.cuda.Event()
        event.record(stream)
        return _OnStream(event, tensor)


def copies_for(device: torch.device) -> Copies:
    """The copies of a device."""
    return StreamCopies(device) if device.type == "cuda" else HostCopies()
