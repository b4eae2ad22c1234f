"""Processes of one Ray, found without Ray: what stands in their environment tells them from all others."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "EDIT_RAY_CHAOS"


def marked(mark: str) -> dict[int, str]:
    """Every living process that was started, however indirectly, with this mark: its pid and its title."""
    needle = f"{MARK}={mark}".encode()
    return {pid: title for pid, title, environment in _processes() if needle in environment}


def _processes() -> Iterator[tuple[int, str, bytes]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    pid = int(folder.name)
                    yield pid, title_of(pid), (folder / "environ").read_bytes()


def title_of(pid: int) -> str:
    """The title of a process; "" once it has ended."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def actors_of(mark: str, name: str) -> list[int]:
    """The pids of the actors of a class, such as `DenoiserActor`."""
    return [pid for pid, title in marked(mark).items() if title.startswith(f"ray::{name}")]


def actor_of(mark: str, name: str) -> int | None:
    """The pid of one of them; None while there is none."""
    return next(iter(actors_of(mark, name)), None)


def encoder_of(mark: str) -> int | None:
    """The pid of a process that encodes a segment; None while there is none."""
    return next((pid for pid, title in marked(mark).items() if " libx264 " in title), None)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, timeout_s: float, what: str):
    """The condition's value as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value
