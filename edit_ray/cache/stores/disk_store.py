"""`DiskOffloadStore`: one safetensors file per entry; the next store opened on the folder finds what this one left."""

from __future__ import annotations

from os import PathLike

import torch

from edit_ray.cache.stores.base import Keys
from edit_ray.tiers.disk_tier import EntryFolder
from edit_ray.tiers.entry_file import aligned_buffer, check_dtype, memory_of
from edit_ray.tiers.reuse_plan import Key


class DiskOffloadStore:
    """A `CacheStore` in files, without a bound. It locks its directory until `close`, or until it is deleted.

    `EntryFolder` describes the files, and counts failures in `files.faults`. An unreadable file is a miss, and removed
    unless the error may pass. Not thread-safe.
    """

    tier = "disk"

    def __init__(self, directory: str | PathLike[str], *, allow_tmpfs: bool = False) -> None:
        """Raises ValueError, with the reason: another store has `directory` open, or it cannot be used."""
        self.files = EntryFolder(directory, allow_tmpfs=allow_tmpfs)
        self.directory = self.files.directory
        self._staging = aligned_buffer(0)  # as large as the largest entry so far

    @property
    def bytes_resident(self) -> int:
        """Bytes of all tensors; a file has up to 8 KiB more."""
        return self.files.bytes_resident

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ValueError for a dtype that these files do not hold."""
        check_dtype(dtype)

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Raises OSError if it cannot be written, DiskFull if there is no room; the key has no entry then."""
        ticket, aside = self.files.begin(key)
        self.files.remove(aside)
        source = tensor.detach().cpu()
        if len(self._staging) < source.nbytes:
            self._staging = aligned_buffer(source.nbytes)
        _typed(self._staging, source.dtype, source.shape).copy_(source)
        self.files.write(key, ticket, memory_of(self._staging), source.dtype, source.shape)

    def get(self, key: Key) -> torch.Tensor | None:
        entry = self.files.entry(key)
        if entry is None:
            return None
        buffer = aligned_buffer(entry.nbytes)
        if self.files.read(key, memory_of(buffer)) is None:
            return None
        return _typed(buffer, entry.dtype, entry.shape)

    def prefetch(self, keys: Keys) -> None:
        """Do nothing: there is no faster tier here."""

    def drop(self, key: Key) -> None:
        self.files.remove(self.files.drop(key))

    def clear(self) -> None:
        for key in self.files.entries():
            self.drop(key)

    def close(self) -> None:
        """Unlock the directory for another store; entries stay there. Later calls raise RuntimeError."""
        self.files.close()

    def sizes(self) -> dict[Key, int]:
        """Bytes of every entry, oldest first."""
        return {key: entry.nbytes for key, entry in self.files.entries().items()}

    def __len__(self) -> int:
        return len(self.files.entries())


def _typed(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The start of a buffer of bytes as a tensor [*shape], without a copy."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return buffer[:size].view(dtype).view(shape)
