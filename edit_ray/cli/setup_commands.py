"""Commands that check this machine, write a model of random weights, or write the monitoring files."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import edit_ray
from edit_ray.errors import ConfigError, ResourcesUnavailable

_GIB = 2**30
_MIN_FREE_DISK = 5 * _GIB
_RAY_PORTS = {6379: "--port", 8265: "--dashboard-port", 52365: "--dashboard-agent-listen-port"}

Finding = tuple[str, str]
"""A level (`ok`, `warning` or `problem`) and a sentence."""


def doctor(options: argparse.Namespace) -> int:
    """Prints one line per check; returns 1 if there is a problem."""
    checks: dict[str, Callable[[], Finding]] = {
        "gpu": _gpu,
        "ffmpeg": _ffmpeg,
        "ray": lambda: _ray(options.address),
        "token": _token,
        "shared memory": _shared_memory,
        "output": lambda: _output(options.output),
    }
    failed = False
    for name, check in checks.items():
        level, text = check()
        print(f"{level:8} {name}: {text}", flush=True)
        failed |= level == "problem"
    return int(failed)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return "ok", ", ".join(f"{card.name} ({card.total_memory / _GIB:.0f} GiB)" for card in cards)
    if Path("/dev/nvidia0").exists():
        build = f"for CUDA {torch.version.cuda}, newer than the driver" if torch.version.cuda else "for CPUs only"
        return "problem", f"not usable: torch {torch.__version__} is built {build}; install another torch"
    return "warning", "none; runs use the CPU, which suits small models only"


def _ffmpeg() -> Finding:
    import imageio_ffmpeg

    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-encoders"]
        encoders = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return "problem", f"it cannot be run ({error}): install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
    if "libx264" not in encoders:
        return "problem", f"{command[0]} has no libx264: unset IMAGEIO_FFMPEG_EXE, or install another ffmpeg"
    return "ok", command[0]


def _ray(address: str | None) -> Finding:
    """Whether the Ray cluster to join answers; without one, whether its ports are free."""
    from edit_ray.actors.connection import check_address

    try:
        known = check_address(address)
    except ResourcesUnavailable as error:
        return "problem", str(error)
    if known not in ("", "auto", "local"):
        return "ok", f"one answers at {known}"
    taken = [f"{port} ({option})" for port, option in _RAY_PORTS.items() if _answers(port)]
    if not taken:
        return "ok", "not running on this machine; its ports are free"
    return "warning", f"ports in use: {', '.join(taken)}; if not by Ray, pass others to `ray start` with these options"


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _token() -> Finding:
    """Whether Ray's commands will send the token, and nobody else can read it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if not path.is_file() and not os.environ.get("RAY_AUTH_TOKEN"):
        if mode == "token":
            return "problem", "RAY_AUTH_MODE is token, and there is none: `ray get-auth-token --generate`"
        return "warning", "none: anyone who reaches Ray's ports can run code; `ray get-auth-token --generate`"
    if path.is_file() and path.stat().st_mode & 0o077:
        return "warning", f"others can read {path}: `chmod 600 {path}`"
    if mode != "token":
        return "warning", f"RAY_AUTH_MODE is {mode}, so `ray` does not send it: `export RAY_AUTH_MODE=token`"
    return "ok", "there is one, and RAY_AUTH_MODE is token"


def _shared_memory() -> Finding:
    from edit_ray.tiers.options import StoreOptions

    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return "warning", f"no /dev/shm ({error.strerror}): the host tier uses a memory file instead"
    needed, text = StoreOptions().host_bytes, f"{free / _GIB:.1f} GiB free in /dev/shm"
    if free < needed:
        return "warning", f"{text}; store.host_bytes is {needed / _GIB:g} GiB: enlarge it (docker: --shm-size)"
    return "ok", text


def _output(option: str | None) -> Finding:
    """Whether files can be written and locked in the folder of runs."""
    import fcntl

    from edit_ray.config import output_root

    try:
        root = output_root(option, os.environ)
        with tempfile.TemporaryFile(dir=root) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ConfigError as error:
        return "problem", str(error)
    except OSError as error:
        return "problem", f"{root} cannot lock files ({error.strerror}): choose another --output"
    free = shutil.disk_usage(root).free
    text = f"{root}, {free / _GIB:.1f} GiB free"
    return ("warning", f"{text}: free some space") if free < _MIN_FREE_DISK else ("ok", text)


def make_model(options: argparse.Namespace) -> int:
    """Writes a Wan model of random weights into a new folder, to measure speed and memory."""
    from edit_ray.engine.loading import DTYPES, choose_device
    from edit_ray.testing.made_model import make_model as write_model

    folder: Path = options.folder.expanduser()
    try:
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            raise ConfigError([f"--output is {folder}, which exists; it must be a new or an empty folder"])
        made = write_model(
            folder,
            options.variant,
            text_encoder=options.text_encoder,
            dtype=DTYPES[options.dtype],
            device=choose_device(options.device),
            seed=options.seed,
        )
    except OSError as error:
        raise ConfigError([f"--output is {folder}, which cannot be written ({error.strerror or error})"]) from None
    print(made)
    return 0


def convert(options: argparse.Namespace) -> int:
    """Writes a published causal checkpoint as a folder that EditCausalWanPipeline loads."""
    from edit_ray.engine.causal_options import CausalOptions, causal_options
    from edit_ray.engine.convert import convert as convert_model

    folder, source = options.folder.expanduser(), options.source.expanduser()
    given = {name: getattr(options, name, None) for name in CausalOptions.model_fields}
    causal = causal_options({name: value for name, value in given.items() if value is not None})
    if not source.exists():
        raise ConfigError([f"SOURCE is {source}, which does not exist"])
    if folder.exists():
        raise ConfigError([f"--output is {folder}, which exists; it must be a new folder"])
    try:
        print(convert_model(source, options.base, folder, causal))
    except OSError as error:
        raise ConfigError([f"--output is {folder}, which cannot be written ({error.strerror or error})"]) from None
    return 0


def dashboards(options: argparse.Namespace) -> int:
    """Writes the dashboards, rules and metrics page whose files are missing or stale."""
    clone = Path(edit_ray.__file__).resolve().parents[1]
    if not (clone / "monitoring" / "generate.py").is_file():
        raise ConfigError(
            ["edit-ray dashboards needs a clone of the repository; the installed package does not contain monitoring/"]
        )
    from monitoring.generate import write_generated

    try:
        written = write_generated(options.into)
    except OSError as error:
        raise ConfigError([f"--into is {options.into}, which cannot be written ({error.strerror})"]) from None
    for path in written:
        print(path)
    print(f"{len(written)} files written" if written else f"all files under {options.into} are up to date")
    return 0
