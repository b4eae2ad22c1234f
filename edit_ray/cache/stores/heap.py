"""Memory of one process in the place of an arena, where shared memory is not to be had."""

from __future__ import annotations

from mmap import mmap
from pathlib import Path

import torch

from edit_ray.cache.stores.allocator import ALIGNMENT, rounded
from edit_ray.cache.stores.arena import Arena
from edit_ray.errors import ResourcesUnavailable


class HeapArena(Arena):
    """`size_bytes` of this process's memory, rounded up to a page, with the interface of an arena. It has no file."""

    def __init__(self, size_bytes: int) -> None:
        """Every page is there when this returns. Raises ResourcesUnavailable, with both figures, where less is free."""
        size, free = rounded(max(size_bytes, 1)), _available_bytes()
        if size > free:
            raise ResourcesUnavailable(
                f"The host tier needs {size} bytes ({size / 2**20:.0f} MiB) of memory, and this node has {free} "
                f"({free / 2**20:.0f} MiB) available: lower store.host_bytes."
            )
        memory = mmap(-1, size)
        torch.frombuffer(memoryview(memory), dtype=torch.uint8)[::ALIGNMENT].zero_()
        super().__init__(Path(), memory, owned=False)

    def owner_lives(self) -> bool:
        """Always: it is this process."""
        return True


def _available_bytes() -> int:
    """See MemAvailable in proc_meminfo(5)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
