"""Who holds a segment of the shared tiers: a process that writes into the arena, told from any other, and seen to end.

A holder is named by its pid and by when it began, in the kernel's clock ticks: with both, a process is not mistaken for
a later one of the same pid, and of two holders of one run it is known which is the later.
"""

from __future__ import annotations

import os
from pathlib import Path

_ENDED = ("Z", "X")  # states of a process whose memory is gone, though its parent has not asked for it


def this_holder() -> str:
    """The name of this process."""
    began = _state_and_start(os.getpid())
    return f"{os.getpid()}-{began[1] if began else 0}"


def is_gone(holder: object) -> bool:
    """Whether no process of this machine has the name any more; what is no such name is nobody's."""
    parsed = _parse(holder)
    if parsed is None:
        return True
    found = _state_and_start(parsed[1])
    return found is None or found[0] in _ENDED or found[1] != parsed[0]


def began_before(holder: object, other: object) -> bool:
    """Whether a holder is known to have begun before the other."""
    one, two = _parse(holder), _parse(other)
    return one is not None and two is not None and one[0] < two[0]


def _parse(holder: object) -> tuple[int, int] | None:
    """Its start and its pid."""
    pid, _, start = str(holder).partition("-")
    return (int(start), int(pid)) if pid.isdecimal() and start.isdecimal() else None


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """See proc_pid_stat(5): after the name, which may hold anything, fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
