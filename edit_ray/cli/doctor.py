"""`edit-ray doctor`: whether this machine has what runs need, one line a question, and what to do where it has not."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edit_ray.errors import ConfigError, ResourcesUnavailable

_GIB = 2**30
_LEAST_DISK = 5 * _GIB
_RAYS_PORTS = {6379: "--port", 8265: "--dashboard-port", 52365: "--dashboard-agent-listen-port"}


@dataclass(frozen=True)
class Finding:
    """What one question has found."""

    level: Literal["ok", "warning", "problem"]
    says: str


def doctor(options: argparse.Namespace) -> int:
    """Asks every question; returns 1 if there is a problem."""
    questions: dict[str, Callable[[], Finding]] = {
        "gpu": gpu,
        "ffmpeg": ffmpeg,
        "ray": lambda: ray_ports(options.address),
        "token": lambda: token(os.environ, Path.home()),
        "shared memory": shared_memory,
        "output": lambda: output(options.output),
    }
    worst = 0
    for name, ask in questions.items():
        found = ask()
        print(f"{found.level:8} {name}: {found.says}", flush=True)
        worst |= found.level == "problem"
    return worst


def gpu() -> Finding:
    """Whether torch can use the GPU that is there."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("ok", ", ".join(f"{card.name} ({card.total_memory / _GIB:.0f} GiB)" for card in cards))
    if Path("/dev/nvidia0").exists():
        why = f"for CUDA {torch.version.cuda}, newer than the driver" if torch.version.cuda else "for CPUs only"
        return Finding("problem", f"there is one, and torch {torch.__version__} is built {why}: install another torch")
    return Finding("warning", "none; runs are made on the CPU, which suits small models only")


def ffmpeg() -> Finding:
    """Whether videos can be encoded."""
    import imageio_ffmpeg

    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-encoders"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return Finding("problem", f"it cannot be run ({error}): install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE")
    if "libx264" not in listed:
        return Finding("problem", f"{command[0]} has no libx264: unset IMAGEIO_FFMPEG_EXE, or install another ffmpeg")
    return Finding("ok", command[0])


def ray_ports(address: str | None) -> Finding:
    """Whether the Ray that would be joined answers; where there is none, whether one could be started."""
    from edit_ray.actors.connection import check_address

    try:
        known = check_address(address)
    except ResourcesUnavailable as error:
        return Finding("problem", str(error))
    if known not in ("", "auto", "local"):
        return Finding("ok", f"one answers at {known}")
    taken = {port: option for port, option in _RAYS_PORTS.items() if _answers("127.0.0.1", port)}
    if not taken:
        return Finding("ok", "none runs on this machine, and its ports are free")
    ports = ", ".join(f"{port} ({option})" for port, option in taken.items())
    return Finding("warning", f"ports in use: {ports}; if by no Ray, give `ray start` others by these options")


def token(environ: Mapping[str, str], home: Path) -> Finding:
    """Whether Ray's own commands will show the token that is there, and nobody else can read it."""
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    mode = environ.get("RAY_AUTH_MODE", "disabled")
    if not path.is_file() and not environ.get("RAY_AUTH_TOKEN"):
        if mode == "token":
            return Finding("problem", "RAY_AUTH_MODE is token, and there is none: `ray get-auth-token --generate`")
        return Finding("warning", "none: whoever reaches Ray's ports may run code; `ray get-auth-token --generate`")
    if path.is_file() and path.stat().st_mode & 0o077:
        return Finding("warning", f"others can read {path}: `chmod 600 {path}`")
    if mode != "token":
        return Finding("warning", f"RAY_AUTH_MODE is {mode}, so `ray` does not show it: `export RAY_AUTH_MODE=token`")
    return Finding("ok", "there is one, and RAY_AUTH_MODE is token")


def shared_memory() -> Finding:
    """Whether the host tier of the default size fits."""
    from edit_ray.tiers.options import StoreOptions

    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Finding("warning", f"no /dev/shm ({error.strerror}): residuals travel through Ray's object store")
    wanted = StoreOptions().host_bytes
    said = f"{free / _GIB:.1f} GiB free in /dev/shm"
    if free < wanted:
        return Finding("warning", f"{said}; store.host_bytes is {wanted / _GIB:g} GiB: enlarge it (docker: --shm-size)")
    return Finding("ok", said)


def output(option: str | None) -> Finding:
    """Whether runs can be written, and locked, where they are to lie."""
    import fcntl

    from edit_ray.config import output_root

    try:
        root = output_root(option, os.environ)
        with tempfile.TemporaryFile(dir=root) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ConfigError as error:
        return Finding("problem", str(error))
    except OSError as error:
        return Finding("problem", f"{root} cannot lock files ({error.strerror}): choose another --output")
    free = shutil.disk_usage(root).free
    said = f"{root}, {free / _GIB:.1f} GiB free"
    return Finding("warning", f"{said}: make room") if free < _LEAST_DISK else Finding("ok", said)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True
