"""The form of an entry's file: safetensors with data at a multiple of 4096 bytes, and checksums over everything.

The header is padded with spaces, so that direct I/O moves the data straight between the file and memory, and stock
`safetensors.torch.load_file` reads the file all the same. Its metadata hold `key` (JSON), `xxh3_64` of the data and
`header_xxh3_64` of the header as it is without that field.
"""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path

import torch
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from edit_ray.cache.stores.allocator import rounded
from edit_ray.cache.stores.store import Key

LONGEST_HEADER = 64 * 1024  # bytes, the eight that say its length included: more is no file of ours
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


@dataclass(frozen=True)
class FileEntry:
    """What a file holds: a tensor's type, its shape and the `checksum_of` its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def checksum_of(memory: memoryview) -> str:
    """xxh3_64 as 16 hexadecimal digits."""
    return xxh3_64_hexdigest(memory)


def file_name(key: Key) -> str:
    """The same for keys that are equal, such as (1,) and (True,). Raises TypeError for what is no key."""
    return f"{xxh3_128_hexdigest(_text(key).encode())}.safetensors"


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ValueError for a type that these files do not hold."""
    if dtype not in _NAMES:
        raise ValueError(f"A file holds no {dtype}; valid are {', '.join(map(str, _NAMES))}.")


def header_of(key: Key, entry: FileEntry) -> bytes:
    """Everything in a file before its data, a multiple of 4096 bytes. Raises ValueError for a key that is too long."""
    metadata = {"key": _text(key), "xxh3_64": entry.checksum}
    tensor = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [0, entry.nbytes]}
    content = {"__metadata__": metadata, "tensor": tensor}
    metadata["header_xxh3_64"] = xxh3_64_hexdigest(json.dumps(content).encode())
    text = json.dumps(content).encode()
    size = rounded(_LENGTH_BYTES + len(text))
    if size > LONGEST_HEADER:
        raise ValueError(f"The key {str(key)[:60]}… makes a header of {size} bytes; valid are {LONGEST_HEADER}.")
    return (size - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text.ljust(size - _LENGTH_BYTES)


def header_size(start: bytes) -> int | None:
    """How long the header is that begins with these bytes, or None if it is none of ours."""
    size = _LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "little")
    return size if len(start) >= _LENGTH_BYTES and size == rounded(size) <= LONGEST_HEADER else None


def parse_header(header: bytes) -> tuple[Key, FileEntry] | None:
    """Key and entry of what `header_of` made, or None for anything else, be it one byte that differs."""
    try:
        content = json.loads(header[_LENGTH_BYTES:])
        metadata, tensor = content["__metadata__"], content["tensor"]
        key = tuple(json.loads(metadata["key"]))
        shape = tuple(operator.index(length) for length in tensor["shape"])
        entry = FileEntry(_DTYPES[tensor["dtype"]], shape, metadata["xxh3_64"])
        return (key, entry) if min(shape, default=0) >= 0 and header_of(key, entry) == header else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_key(path: Path) -> Key | None:
    """The key of the entry in a file, None if the file is gone or none of ours. Raises OSError."""
    try:
        with open(path, "rb") as file:
            start = file.read(_LENGTH_BYTES)
            size = header_size(start)
            described = None if size is None else parse_header(start + file.read(size - _LENGTH_BYTES))
    except FileNotFoundError:
        return None
    return None if described is None else described[0]


def _text(key: Key) -> str:
    return json.dumps([part if part is None or isinstance(part, str) else operator.index(part) for part in key])
