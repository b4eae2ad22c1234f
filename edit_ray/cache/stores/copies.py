"""How bytes go between a segment's device and the arena: at once on the CPU, beside the computation on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edit_ray.cache.stores.device_pool import DevicePlace


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
    """A tensor on the device, and the copy that fills it; None for one that was computed there. `place` is where it
    lies in a pool, if it does.
    """

    tensor: Tensor
    copy: Copy | None = None
    place: DevicePlace | None = None


class Copies(Protocol):
    """Copies of one device. Places are views of the arena: contiguous tensors on the CPU."""

    def take(self, tensor: Tensor) -> Taken:
        """What is computed so far of a contiguous tensor of the device, to be copied out later."""

    def out(self, taken: Taken, place: Tensor) -> Copy:
        """Copy to a place of the same type and shape."""

    def load(self, place: Tensor, into: DevicePlace | None = None) -> Loaded:
        """The bytes of a place on the device, in a place of a pool there or else in a fresh tensor."""

    def keep(self, tensor: Tensor, into: DevicePlace) -> Loaded:
        """What is computed so far of a tensor, copied into a place of a pool."""

    def use(self, loaded: Loaded) -> Tensor:
        """The tensor, for what the caller computes from now on; of what lies in a pool a copy that is the caller's."""

    def let_go(self, loaded: Loaded) -> None:
        """Its place in a pool, if it has one, may be filled again after its copy and what is computed so far."""


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

    def load(self, place: Tensor, into: DevicePlace | None = None) -> Loaded:
        return Loaded(place.clone() if into is None else into.tensor.copy_(place), _DONE, into)

    def keep(self, tensor: Tensor, into: DevicePlace) -> Loaded:
        return Loaded(into.tensor.copy_(tensor), None, into)

    def use(self, loaded: Loaded) -> Tensor:
        return loaded.tensor if loaded.place is None else loaded.tensor.clone()

    def let_go(self, loaded: Loaded) -> None:
        return


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

    The call returns at once if the arena is registered with CUDA. The memory of what is loaded into a fresh tensor is
    the loading stream's: taken from the computing one, it would be free only after everything that was queued there
    before. A place of a pool is filled when it is free, for which streams wait, and never the caller.
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

    def load(self, place: Tensor, into: DevicePlace | None = None) -> Loaded:
        if into is not None:
            self._await_free(into, self.loading)
            into.tensor.record_stream(self.loading)  # of a pool that is let go while this is under way
        with self.loading:
            if into is None:
                tensor = place.to(self._device, non_blocking=True)
            else:
                tensor = into.tensor.copy_(place, non_blocking=True)
        return Loaded(tensor, self._on_stream(self.loading, tensor), into)

    def keep(self, tensor: Tensor, into: DevicePlace) -> Loaded:
        self._await_free(into, torch.cuda.current_stream(self._device))
        return Loaded(into.tensor.copy_(tensor, non_blocking=True), None, into)

    def use(self, loaded: Loaded) -> Tensor:
        computing = self._computing_after(loaded)
        if loaded.place is not None:
            return loaded.tensor.clone()
        if loaded.copy is not None:
            loaded.tensor.record_stream(computing)
        return loaded.tensor

    def let_go(self, loaded: Loaded) -> None:
        if loaded.place is not None:
            if loaded.place.free is None:
                loaded.place.free = torch.cuda.Event()
            loaded.place.free.record(self._computing_after(loaded))

    def _computing_after(self, loaded: Loaded) -> torch.cuda.Stream:
        """The computing stream, which waits for what fills a tensor."""
        computing = torch.cuda.current_stream(self._device)
        if isinstance(loaded.copy, _OnStream):
            computing.wait_event(loaded.copy.event)
        return computing

    def _await_free(self, place: DevicePlace, stream: torch.cuda.Stream) -> None:
        """The stream that will fill a place waits until it is free."""
        if place.free is None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            stream.wait_event(place.free)

    def _on_stream(self, stream: torch.cuda.Stream, tensor: Tensor) -> Copy:
        event = torch.cuda.Event()
        event.record(stream)
        return _OnStream(event, tensor)


def copies_for(device: torch.device) -> Copies:
    """The copies of a device."""
    return StreamCopies(device) if device.type == "cuda" else HostCopies()
