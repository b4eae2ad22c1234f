"""The folder of a disk tier: its files, and disks whose calls wait or fail."""

import errno
import os
from pathlib import Path

import torch

from edit_ray import files
from edit_ray.cache import DiskOffloadStore
from edit_ray.tiers.disk_tier import LOCK


def on_disk(path):
    """A store in a folder of the test's, which on some machines lies in memory."""
    return DiskOffloadStore(path, allow_tmpfs=True)


def bytes_of(count, fill=0):
    return torch.full((count,), fill, dtype=torch.uint8)


def files_in(folder):
    """Every path in the folder but the lock of the store that has it open."""
    return [Path(folder) / name for name in os.listdir(folder) if name != LOCK]


def lost(store):
    """The number of files that a store found missing, torn or damaged."""
    return sum(store.files.faults[fault] for fault in ("missing", "length", "header", "checksum"))


class Calls(files.Disk):
    """A disk whose calls of some kinds do something first; a created file is not an `open`, but a `create`."""

    def before(self, call):
        """Called with the kind of a call."""

    def open(self, path, flags):
        self.before("create" if flags & os.O_CREAT else "open")
        return super().open(path, flags)

    def write(self, descriptor, parts, offset):
        self.before("write")
        return super().write(descriptor, parts, offset)

    def read(self, descriptor, parts, offset):
        self.before("read")
        return super().read(descriptor, parts, offset)

    def replace(self, source, target):
        self.before("rename")
        super().replace(source, target)

    def unlink(self, path):
        self.before("unlink")
        super().unlink(path)


class Faults(Calls):
    """Fails the next call of a kind, an `open` also of a new file: `next` is the kind and the errno."""

    def __init__(self):
        self.next, self.hits = None, 0

    def before(self, call):
        if self.next and self.next[0] == call.replace("create", "open"):
            number, self.next = self.next[1], None
            self.hits += 1
            raise OSError(number, os.strerror(number))


class NoListing(files.Disk):
    def listdir(self, path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
