"""One entry's file: its format, and direct I/O between memory and disk, around the page cache.

The file is safetensors, with data at a multiple of 4096 bytes and checksums over everything. The header is padded with
spaces, so that direct I/O moves the data straight between the file and memory, and stock `safetensors.torch.load_file`
reads the file all the same. Its metadata are `key` (JSON), `xxh3_64` of the data, and `header_xxh3_64` of the header
without that field.
"""

from __future__ import annotations

import errno
import json
import math
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from typing import TypeVar

import torch
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from edit_ray import files
from edit_ray.tiers.reuse_plan import Key
from edit_ray.tiers.slots import PAGE, whole_pages

LONGEST_HEADER = 64 * 1024  # bytes, including the eight that say its length; a longer header is not of this format
_LENGTH_BYTES = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # follows no link under a name of ours, waits for no pipe
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """What a file holds: a tensor's dtype, its shape, and the xxh3_64 of its bytes as 16 hexadecimal digits."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_name(key: Key) -> str:
    """The file of an entry, one for equal keys such as (1,) and (True,). Raises TypeError for what is not a key."""
    return f"{xxh3_128_hexdigest(_text(key).encode())}.safetensors"


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that these files do not hold."""
    if dtype not in _NAMES:
        raise ValueError(f"A file holds no {dtype}; it can hold {', '.join(map(str, _NAMES))}.")


def header_of(key: Key, entry: FileEntry) -> bytes:
    """Everything in a file before its data, a multiple of 4096 bytes. Raises ValueError for a key that is too long."""
    metadata = {"key": _text(key), "xxh3_64": entry.checksum}
    tensor = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [0, entry.nbytes]}
    content = {"__metadata__": metadata, "tensor": tensor}
    metadata["header_xxh3_64"] = xxh3_64_hexdigest(json.dumps(content).encode())
    text = json.dumps(content).encode()
    size = whole_pages(_LENGTH_BYTES + len(text))
    if size > LONGEST_HEADER:
        raise ValueError(f"The key {str(key)[:60]}… makes a header of {size} bytes; {LONGEST_HEADER} are allowed.")
    return (size - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text.ljust(size - _LENGTH_BYTES)


def parse_header(header: bytes) -> tuple[Key, FileEntry] | None:
    """Key and entry of a header that `header_of` made, or None for anything else, even if one byte differs."""
    try:
        content = json.loads(header[_LENGTH_BYTES:])
        metadata, tensor = content["__metadata__"], content["tensor"]
        key = tuple(json.loads(metadata["key"]))
        shape = tuple(operator.index(length) for length in tensor["shape"])
        entry = FileEntry(_DTYPES[tensor["dtype"]], shape, metadata["xxh3_64"])
        return (key, entry) if min(shape, default=0) >= 0 and header_of(key, entry) == header else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_header(descriptor: int) -> tuple[int, Key, FileEntry] | None:
    """The size of an open file's header, its key and entry; None if it is not of this format. Raises OSError."""
    size = _LENGTH_BYTES + int.from_bytes(files.read_at(descriptor, 0, _LENGTH_BYTES), "little")
    if size != whole_pages(size) or size > LONGEST_HEADER:
        return None
    described = parse_header(files.read_at(descriptor, 0, size))
    return None if described is None else (size, *described)


def read_key(path: Path) -> Key | None:
    """The key of the entry in a file, None if the file is gone or not of this format. Raises OSError."""
    with suppress(FileNotFoundError), files.opened(path) as descriptor:
        if header := read_header(descriptor):
            return header[1]
    return None


def _text(key: Key) -> str:
    return json.dumps([part if part is None or isinstance(part, str) else operator.index(part) for part in key])


class DiskFull(OSError):
    """The disk or a quota has no room for a file. Nothing is left of it: make room and try again."""


def as_disk_full(error: OSError) -> OSError:
    """A DiskFull if the error says that there is no room, else the error itself."""
    if error.errno not in FULL or isinstance(error, DiskFull):
        return error
    return DiskFull(error.errno, error.strerror, error.filename)


class DirectFiles:
    """Writes and reads whole files with O_DIRECT, until that is refused at `open` or later.

    A file is a list of parts, each of which starts in memory at a multiple of `PAGE` and is a multiple long; its
    last part may go beyond the file's true size.
    """

    def __init__(self, num_transfers: int = 1) -> None:
        """At most `num_transfers` files move at once; further threads wait."""
        self.direct = bool(_DIRECT)
        self._transfers = BoundedSemaphore(num_transfers)

    def write(self, path: Path, parts: Sequence[memoryview], size: int) -> None:
        """Make a new file of the first `size` bytes of `parts`, not synced. Raises OSError; nothing is left then."""

        length = sum(map(len, parts))

        def write(flag: int) -> None:
            try:
                with files.opened(path, files.NEW | flag) as descriptor:
                    if _move(files.disk.write, descriptor, parts, length) < length:
                        raise OSError(errno.EIO, "The filesystem took no more bytes", str(path))
                    if length != size:
                        files.disk.truncate(descriptor, size)
            except BaseException:
                with suppress(OSError):  # also what an open that was refused has made
                    files.disk.unlink(path)
                raise

        self._direct_if_possible(write)

    def read(self, path: Path, parts: Sequence[memoryview], size: int) -> bool:
        """Fill `parts` with a file of `size` bytes; False, with `parts` undefined, for a file of another size."""

        def read(flag: int) -> bool:
            with files.opened(path, READING | flag) as descriptor:
                return os.fstat(descriptor).st_size == size and _move(files.disk.read, descriptor, parts, size) == size

        return self._direct_if_possible(read)

    def _direct_if_possible(self, action: Callable[[int], T]) -> T:
        with self._transfers:
            if not self.direct:
                return action(0)
            try:
                return action(_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
            done = action(0)
            self.direct = False  # only now: had this failed as well, O_DIRECT would not have been the cause
            return done


def _move(
    call: Callable[[int, Sequence[memoryview], int], int], descriptor: int, parts: Sequence[memoryview], size: int
) -> int:
    """Repeat a call until it has moved `size` bytes or moves no more; the bytes moved."""
    left, done = list(parts), 0
    while done < size and (moved := call(descriptor, left, done)):
        done += moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if moved:
            left[0] = left[0][moved:]
    return done


def aligned_buffer(size: int) -> torch.Tensor:
    """Fresh memory [whole_pages(size)] uint8 that starts at a multiple of `PAGE`."""
    memory = torch.empty(whole_pages(size) + PAGE, dtype=torch.uint8)
    return memory.narrow(0, -memory.data_ptr() % PAGE, whole_pages(size))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, without a copy."""
    return tensor.numpy().data


def is_tmpfs(directory: Path) -> bool:
    """Whether a folder lies in memory; False where that is unknown, as without /proc."""
    device = directory.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    # "36 35 98:0 /root /mount/point rw,noatime shared:1 - ext4 /dev/root rw": see proc_pid_mountinfo(5).
    found = (line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2] == wanted)
    return next(found, "") in ("tmpfs", "ramfs")
