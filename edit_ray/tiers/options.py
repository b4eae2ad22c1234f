"""The options of the tiers."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from edit_ray.options import Options

MAX_BYTES = 2**50

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), start=1)},
    "KB": 1000,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}
_QUANTITY = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE]\+?[0-9]{1,2})?) ?([A-Za-z]*)")


def parse_bytes(value: object) -> object:
    """A number of bytes from `256MiB`, `1.5GB`, `1e6` or a whole number; anything else is returned as it came.

    Raises:
        ValueError: text that is not a number of bytes.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{value!r} is not a number of bytes such as 256MiB")
    count = Fraction(match[1]) * _UNITS[match[2]]
    if count.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    if count > MAX_BYTES:
        raise ValueError(f"{value!r} is more than {MAX_BYTES} bytes")
    return int(count)


# Variables without secrets: whoever submits a run sees their values.
NODE_VARIABLES = (
    *("HOME", "USER", "LOGNAME", "TMPDIR", "NVME", "SCRATCH", "LOCAL_SCRATCH"),
    *("SLURM_TMPDIR", "SLURM_JOB_ID", "EDIT_RAY_DISK", "EDIT_RAY_DISK_*"),
)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def _check_variables(directory: str) -> str:
    for match in _VARIABLE.finditer(directory):
        name = match[1] or match[2]
        if name not in NODE_VARIABLES and not name.startswith("EDIT_RAY_DISK_"):
            raise ValueError(f"which names the variable {name}, and that is not allowed.")
    return directory


def on_this_node(directory: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder that `store.directory` means on this node.

    Raises ValueError: it names a variable that is not allowed, or not set here.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not environment.get(name):
            raise ValueError(f"which names the variable {name}, and that is not set on this node.")
        return environment[name]

    return Path(_VARIABLE.sub(value_of, _check_variables(str(directory))))


def _bytes(example: str) -> Any:
    return Field(
        ge=0, le=MAX_BYTES, json_schema_extra={"valid": f"a number of bytes from 0 to 1024TiB, such as {example}"}
    )


ByteCount = Annotated[int, _bytes("256MiB or 1e9"), BeforeValidator(parse_bytes)]
DiskBytes = Annotated[int, _bytes("20GiB, or null for no bound"), BeforeValidator(parse_bytes)]


class StoreOptions(Options):
    """Bounds and places of the tiers: bytes on the GPU for residuals in flight from and to the CacheStore actor, bytes
    that this actor may use in host memory and on disk (None: no bound), and the disk tier's folder.

    On a GPU `device_bytes` is allocated once, at a run's first segment; less where no segment reads so much. It is
    freed at the run's end, or when denoising runs out of memory: then nothing is prefetched to the GPU.

    `shared_memory` places the host tier: in /dev/shm (`require`), there or, where that has too little room, in other
    memory (`auto`), or only in other memory (`never`).
    """

    device_bytes: ByteCount = 2**29
    host_bytes: ByteCount = 2**30
    disk_bytes: DiskBytes | None = None
    directory: Annotated[str, AfterValidator(_check_variables)] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        json_schema_extra={
            "valid": "text of 1 to 4096 characters, in which the variables may be "
            + ", ".join(f"${name}" for name in NODE_VARIABLES)
        },
    )
    allow_tmpfs: bool = False
    shared_memory: Literal["auto", "require", "never"] = "auto"


@dataclass(frozen=True)
class ReusingRun:
    """What the leases of a run need to know of it."""

    name: str  # under which the store keeps the run's entries
    options: StoreOptions
    directory: Path  # of the disk tier
    root: Path  # of the runs
    timeout_s: float  # for an op that a segment waits for
