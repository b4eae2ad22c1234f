"""Copies between a segment's device and host memory: immediate on the CPU, beside the computation on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_ray.tiers.protocol import EntryForm


class Copy:
    """A transfer that has ended when it is made, as on the CPU."""

    def done(self) -> bool:
        """Whether it has ended."""
        return True

    def wait(self) -> None:
        """Return when it has ended."""


@dataclass(slots=True)
class Taken:
    """A tensor to be copied to the host, unchanged until then; on a GPU with the event after which it is complete."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None


@dataclass(slots=True)
class Loaded:
    """A tensor on the device. `copy` fills it; None if it was computed there.

    `readers` is the number of reads to come; `pooled` says whether the tensor belongs to a `DevicePool`.
    """

    tensor: Tensor
    copy: Copy | None = None
    pooled: bool = False
    readers: int = 1


class HostCopies:
    """Copies between one device and host memory, where a place is a contiguous tensor; here the device is the CPU."""

    def take(self, tensor: Tensor) -> Taken:
        """Note that a contiguous tensor is complete once the work queued now is done; it is copied later."""
        return Taken(tensor)

    def out(self, taken: Taken, place: Tensor) -> Copy:
        """Copy to a place of the same dtype and shape."""
        place.copy_(taken.tensor)
        return Copy()

    def empty(self, form: EntryForm) -> Tensor:
        """A new tensor on the device, for these copies to load into."""
        return torch.empty(form.shape, dtype=form.dtype)

    def load(self, place: Tensor, into: Tensor | None = None) -> Loaded:
        """Copy a place to the device: to `into`, from a pool, or to a new tensor."""
        return Loaded(place.clone() if into is None else into.copy_(place), Copy(), into is not None)

    def use(self, loaded: Loaded) -> Tensor:
        """The tensor, for what the caller computes from now on."""
        return loaded.tensor


@dataclass(slots=True)
class _OnStream(Copy):
    """A copy made by a stream; it keeps the tensor that it reads or fills."""

    event: torch.cuda.Event
    tensor: Tensor

    def done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class StreamCopies(HostCopies):
    """On a GPU one stream for each direction, so that both run at once and neither waits for the computation.

    A call returns at once if the host memory is page-locked. Loads are allocated on the loading stream: on the
    computing stream, their memory would be free only after everything that was queued there before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: list[torch.cuda.Event] = []  # reused: making one takes longer than starting a copy
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

    def empty(self, form: EntryForm) -> Tensor:
        with self.loading:
            return torch.empty(form.shape, dtype=form.dtype, device=self._device)

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


def copies_for(device: torch.device) -> HostCopies:
    """The copies of a device."""
    return StreamCopies(device) if device.type == "cuda" else HostCopies()


class DevicePool:
    """Device memory that a run allocates once: spare tensors, by form. Not thread-safe.

    A load, or an entry that stays on the device, takes a spare tensor. When that is passed on, to a reader that may
    keep it, `restock` makes another. So the allocated memory does not depend on how much is in flight, and nothing is
    copied for that.
    """

    def __init__(self, device: torch.device, number: Mapping[EntryForm, int]) -> None:
        """Allocate `number` tensors of each form. Raises torch.OutOfMemoryError where a GPU has too little memory."""
        self.copies = copies_for(device)
        self._number = dict(number)
        self._spare = {form: [self.copies.empty(form) for _ in range(count)] for form, count in number.items()}

    @property
    def number(self) -> int:
        """Tensors, spare or taken."""
        return sum(self._number.values())

    @property
    def free(self) -> int:
        """Spare tensors."""
        return sum(map(len, self._spare.values()))

    def take(self, form: EntryForm) -> Tensor | None:
        """A spare tensor, None if there is none. Its taker restocks once, at the end of its use."""
        spare = self._spare.get(form)
        return spare.pop() if spare else None

    def restock(self, form: EntryForm) -> None:
        """Replace a tensor that was taken. Where the device has no memory for another, the pool has one less."""
        if len(self._spare.get(form, ())) < self._number.get(form, 0):
            try:
                self._spare[form].append(self.copies.empty(form))
            except torch.OutOfMemoryError:
                self._number[form] -= 1

    def release(self) -> None:
        """Free all spare tensors; tensors that are still out are not replaced."""
        self._number.clear()
        self._spare.clear()
