"""Disks that fail, are slow or do something else in between."""

import errno
import os
from functools import partial

from edit_ray import files


def faulty(**wrappers):
    """A disk with other calls: each wrapper is given the true call, and then the call's arguments."""

    def replaced(name, wrapper):
        return lambda disk, *arguments: wrapper(partial(getattr(files.Disk, name), disk), *arguments)

    return type("Faulty", (files.Disk,), {name: replaced(name, wrapper) for name, wrapper in wrappers.items()})()


def broken(*_arguments, number=errno.EIO):
    raise OSError(number, os.strerror(number))


def first_bytes(call, descriptor, parts, offset):
    """A read or a write of seven bytes at most."""
    return call(descriptor, [memoryview(parts[0])[:7]], offset)
