"""What a result was measured by and on."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def provenance(device: str) -> dict[str, Any]:
    """Command, date, commit (of git, or where that is not to be had of the variable COMMIT), machine and versions."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain") else "")
    versions = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "edit_ray", "cache-dit"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": shlex.join(["python", *_without_output(sys.argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or commit,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "versions": versions,
    }


def _without_output(arguments: Sequence[str]) -> list[str]:
    """A command line less where it writes, which changes nothing that is measured."""
    named = {index for index, argument in enumerate(arguments) if argument in ("--output", "--directory", "--json")}
    dropped = named | {index + 1 for index in named}
    return [argument for index, argument in enumerate(arguments) if index not in dropped]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
