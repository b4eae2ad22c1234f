"""The disk tier as the owner of an arena uses it: a few threads that move bytes straight between memory and files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from os import PathLike
from types import TracebackType

import torch

from edit_ray.tiers.entry_file import FileEntry
from edit_ray.tiers.entry_folder import EntryFolder
from edit_ray.tiers.reuse_plan import Key


class DiskTier:
    """Entries in files, written from and read into memory of the caller, in the order asked for.

    `memory` and `into` start at a multiple of 4096 and hold the tensor's bytes rounded up to one, as a slot does;
    they are left alone until the future is done. `files` is the index and counts faults. A future that waits in the
    queue may be cancelled. Of `num_threads` threads each is at the disk; as many more take what is read, or bring what
    is to be written, so that the disk does not wait for checksums.
    """

    def __init__(self, directory: str | PathLike[str], *, num_threads: int = 2, allow_tmpfs: bool = False) -> None:
        """Opens or makes `directory` and finds the entries in it. Raises ValueError as `EntryFolder` does."""
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; valid is 1 or more.")
        self.files = EntryFolder(directory, num_transfers=num_threads, allow_tmpfs=allow_tmpfs)
        self._threads = ThreadPoolExecutor(2 * num_threads, thread_name_prefix="disk")
        self._closed = False

    def write(self, key: Key, memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Future[bool]:
        """Replace an entry. What was there is gone at once, what comes can be read when the future is done.

        False if it was dropped or written anew before that. Its error is DiskFull where room must be made, else an
        OSError; the key has no entry then.
        """
        self._check_open()
        ticket, aside = self.files.begin(key)
        future = self._threads.submit(self.files.write, key, ticket, memory, dtype, tuple(shape))
        if aside is not None:
            self._threads.submit(self.files.remove, aside)
        return future

    def read(self, key: Key, into: memoryview) -> Future[FileEntry | None]:
        """Read an entry; None if there is none or it cannot be read, and what `into` holds then is rubbish."""
        self._check_open()
        return self._threads.submit(self.files.read, key, into)

    def sync(self, keys: Sequence[Key]) -> None:
        """Make entries durable that are whole. Raises OSError, at once if a file cannot be synced."""
        self._check_open()
        self.files.sync(keys)

    def drop(self, key: Key) -> None:
        """Forget an entry at once, also one that is being written; its file goes when a thread is free."""
        self._check_open()
        aside = self.files.drop(key)
        if aside is not None:
            self._threads.submit(self.files.remove, aside)

    def clear(self) -> None:
        """Forget every entry, also those that are being written."""
        for key in self.files.known_keys():
            self.drop(key)

    def close(self) -> None:
        """Cancel what waits, wait for what is being moved, end the threads, unlock the folder. Entries stay on disk."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        with suppress(OSError):  # the next one in this folder does it as well
            self.files.remove_unfinished()
        self.files.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("The disk tier is closed.")

    def __enter__(self) -> DiskTier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
