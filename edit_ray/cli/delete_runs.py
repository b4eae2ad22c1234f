"""`edit-ray delete` and `edit-ray prune`: remove runs and their files."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edit_ray.cli.run_commands import confirmed, known_runs, line_of, reader_of
from edit_ray.errors import ConfigError, EditRayError, RunLive

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.runs.folder import RunFolder

_AGE = re.compile(r"([0-9]{1,6})([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def delete(options: argparse.Namespace) -> int:
    """Removes one inactive run."""
    from edit_ray.runs.ids import check_run_id

    client = reader_of(options)
    status = client.status(check_run_id(options.run_id))
    client.check_mine(status, options.force)
    if not status.ended and status.state != "open":
        raise RunLive(f"run {status.run_id!r} is at work; stop it with `edit-ray cancel {status.run_id}` first")
    return _remove_all([status], options)


def prune(options: argparse.Namespace) -> int:
    """Removes the user's own runs whose manifest has not changed for some time."""
    age = _AGE.fullmatch(options.older_than.strip())
    if age is None:
        problem = f"--older-than is {options.older_than!r}; it must be a whole number with a unit: 30d, 12h or 2w"
        raise ConfigError([problem])
    before, client = time.time() - int(age[1]) * _UNIT_S[age[2]], reader_of(options)
    return _remove_all(
        [
            run
            for run in known_runs(client)
            if client.owner.owns(run.owner)
            and Path(run.path).parent.samefile(client.output)
            and run.state in options.state
            and os.stat(Path(run.path) / "manifest.jsonl").st_mtime <= before
        ],
        options,
    )


def _remove_all(runs: list[RunStatus], options: argparse.Namespace) -> int:
    """Removes the runs after confirmation. A run that cannot be removed does not keep the others."""
    from edit_ray.runs.folder import RunFolder, remove_run, size_of

    folders = [RunFolder(Path(run.path).parent, run.run_id) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        print(f"{line_of(run)}  {size_of(folder) / 2**20:.1f} MiB")
    if not runs:
        print("nothing to remove")
        return 0
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    if not options.yes and not confirmed(f"Remove {count} for good?"):
        raise ConfigError([f"nothing was removed; --yes removes {count}"])
    failed = False
    for folder in folders:
        try:
            residuals: list[Path] = []
            with suppress(ConfigError):  # an unreadable configuration: stores remove entries that belong to no run
                residuals = list(_residuals_of(folder))
            remove_run(folder)
            for path in residuals:
                path.unlink(missing_ok=True)
            print(f"removed {folder.path}")
        except (EditRayError, OSError) as error:
            failed = True
            print(f"edit-ray: {folder.path} stays: {error}", file=sys.stderr)
    return 1 if failed else 0


def _residuals_of(folder: RunFolder) -> Iterator[Path]:
    """The run's entries on disk, which stay in the store's directory after the loss of a cluster."""
    from edit_ray.actors.messages import RunSpec
    from edit_ray.config import load_config

    spec = RunSpec.of(folder.path.parent, load_config(folder.run_yaml, check_model=False), folder.read_manifest())
    if files := list(Path(os.path.expandvars(spec.residuals_directory)).rglob("*.safetensors")):
        from edit_ray.tiers.entry_file import read_key

        yield from (path for path in files if (key := read_key(path)) and str(key[0]).startswith(f"{spec.key}."))
