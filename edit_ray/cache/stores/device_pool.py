"""Memory of the device that a run takes once: places for residuals of one form, each filled again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class DevicePlace:
    """Room for one residual. On a GPU `free` is the moment from which it may be filled, None before its first use:
    the pool's memory may have been another's, with which the device was busy then.
    """

    tensor: Tensor
    readers: int = 0
    free: torch.Event | None = None


class DevicePool:
    """Places that are taken and given back, the one that was given back first before the others: so that who fills it
    waits least for the device. Not thread-safe.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Sequence[int], number: int) -> None:
        """Takes the memory of `number` tensors; raises torch.OutOfMemoryError where a GPU has too little."""
        memory = torch.empty((number, *shape), dtype=dtype, device=device)
        self.number = number
        self._free = deque(DevicePlace(tensor) for tensor in memory.unbind())

    @property
    def free(self) -> int:
        """How many places may be taken."""
        return len(self._free)

    def take(self) -> DevicePlace | None:
        """A place for one reader, None while there is none; who takes it may let it have more `readers`."""
        if not self._free:
            return None
        place = self._free.popleft()
        place.readers = 1
        return place

    def give_back(self, place: DevicePlace) -> None:
        """A reader is through; the last one's call makes it free. Raises ValueError for a place that is free."""
        if place.readers == 0:
            raise ValueError("The place is free: it was given back before.")
        place.readers -= 1
        if place.readers == 0:
            self._free.append(place)
