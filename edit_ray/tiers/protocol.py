"""What the GPU actor's process and the CacheStore actor's share: leases, op tables, and the names of processes.

A segment's reads and writes, in the order of use, are its ops. Each has two words in a table in the arena: `place`,
which the store writes, and `state`, which the segment writes. So between `prepare` and `complete` neither calls the
other, and a segment may work on more than the arena holds: the store loads what comes next while the segment runs.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edit_ray.tiers.arena import Arena
from edit_ray.tiers.reuse_plan import Key

WAITING, NONE = 0, -1  # words of `place`; any other is an offset in the arena, plus 1
UNTOUCHED, NEEDED, DONE, SKIPPED = 0, 1, 2, 3  # words of `state`
_WORD = np.dtype(np.int64)
_ENDED = ("Z", "X")  # states of a process whose memory is gone, though its parent has not waited for it


@dataclass(frozen=True)
class EntryForm:
    """What an entry is: the device it is computed on, its dtype and its shape."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:  # bytes
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Op:
    """One read or write of one entry."""

    key: Key
    form: EntryForm
    writes: bool


@dataclass(frozen=True)
class Lease:
    """What `prepare` returns: the arena's path, the offset of the segment's table of ops, the store's incarnation."""

    arena: str
    table: int
    store: str


def table_bytes(num_ops: int) -> int:
    """Bytes of a table."""
    return 2 * num_ops * _WORD.itemsize


class _Fence(threading.local):
    """A memory fence: other CPUs see this thread's accesses before a call before those after it.

    x86 keeps the order of loads and that of stores by itself; Arm does so only around locks that are released and
    acquired.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


fence = _Fence()


class OpTable:
    """The words of a segment's ops, in an arena at `offset`. Each is written by one side only, and aligned, so never
    torn. The store writes a place once its bytes are there; the segment writes DONE once it has used them. A fence
    stands before each write and after each read.
    """

    def __init__(self, arena: Arena, offset: int, num_ops: int) -> None:
        words: NDArray[np.int64] = np.frombuffer(arena.memory(offset, table_bytes(num_ops)), dtype=_WORD)
        self._places, self._states = words[:num_ops], words[num_ops:]

    def clear(self) -> None:
        """All waiting, none touched."""
        self._places[:] = WAITING
        self._states[:] = UNTOUCHED

    def give(self, index: int, offset: int | None) -> None:
        """The place of an op; None if it has none: a read that was lost, a write that nobody keeps."""
        fence()
        self._places[index] = NONE if offset is None else offset + 1

    def states(self) -> NDArray[np.int64]:
        """A copy of every op's state."""
        states = self._states.copy()
        fence()
        return states

    def place(self, index: int) -> int | None:
        """The offset of an op, or WAITING - 1 while it has none yet; None if it never will."""
        word = int(self._places[index])
        fence()
        return None if word == NONE else word - 1

    def mark(self, index: int, state: int) -> None:
        """Write the state of an op."""
        fence()
        self._states[index] = state


# A process that holds leases is named by its pid and its start in the kernel's clock ticks: so it is not mistaken for a
# later one of the same pid, and of two holders of one run it is known which began later.


def this_process() -> str:
    """The name of this process."""
    began = _state_and_start(os.getpid())
    return f"{os.getpid()}-{began[1] if began else 0}"


def is_gone(process: object) -> bool:
    """Whether no process of this machine has the name any more; anything else is nobody's."""
    parsed = _parse(process)
    if parsed is None:
        return True
    found = _state_and_start(parsed[1])
    return found is None or found[0] in _ENDED or found[1] != parsed[0]


def began_before(process: object, other: object) -> bool:
    """Whether a process is known to have begun before the other."""
    one, two = _parse(process), _parse(other)
    return one is not None and two is not None and one[0] < two[0]


def _parse(process: object) -> tuple[int, int] | None:
    """Its start and its pid."""
    pid, _, start = str(process).partition("-")
    return (int(start), int(pid)) if pid.isdecimal() and start.isdecimal() else None


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """See proc_pid_stat(5): after the name, which may hold anything, fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
