"""Memory of the device that a run holds from its first segment on, for residuals of one form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edit_ray.cache.stores.copies import copies_for


class DevicePool:
    """Spare tensors. One is taken for what comes to the device or stays there; once that has left the store, for who
    reads it and may keep it, another spare one takes its place. So what is allocated does not depend on how much is on
    its way, and nothing is copied for that. Not thread-safe.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: Sequence[int], number: int) -> None:
        """Takes the memory of `number` tensors; raises torch.OutOfMemoryError where a GPU has too little."""
        self.copies = copies_for(device)
        self.number = number
        self._form = dtype, tuple(shape)
        self._spare = [self.copies.room(*self._form) for _ in range(number)]

    @property
    def free(self) -> int:
        """How many may be taken."""
        return len(self._spare)

    def take(self) -> Tensor | None:
        """A spare tensor, None while there is none. Whoever takes one restocks once, at its end."""
        return self._spare.pop() if self._spare else None

    def restock(self) -> None:
        """What was taken has left. Where the device has no memory for another one, there is one less from then on."""
        if len(self._spare) < self.number:
            try:
                self._spare.append(self.copies.room(*self._form))
            except torch.OutOfMemoryError:
                self.number -= 1

    def let_go(self) -> None:
        """Holds nothing from now on."""
        self.number = 0
        self._spare.clear()
