"""Commands that look at runs: they start nothing, and read from disk what no segment scheduler can say."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edit_ray.cli.runs import client_of, line_of
from edit_ray.errors import ConfigError, EditRayError

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.client import LongVideoClient


def list_runs(options: argparse.Namespace) -> int:
    """Prints a line for each run in the folder of runs, or at work elsewhere in this Ray."""
    client = reader_of(options)
    runs = list(known_runs(client))
    shown = [run for run in runs if options.all or client.owner.owns(run.owner)]
    for run in shown:
        print(line_of(run, owner=options.all))
    hidden = len(runs) - len(shown)
    if hidden:
        print(f"{hidden} more of other owners: --all shows them")
    elif not shown:
        print(f"no runs in {client.output}")
    return 0


def known_runs(client: LongVideoClient) -> Iterator[RunStatus]:
    """The runs on disk, the oldest first, with the segment scheduler's word where it has one; then its others."""
    from edit_ray.actors.messages import RunStatus
    from edit_ray.runs.folder import folders_in

    try:
        said = {os.path.realpath(run.path): run for run in client.runs()}
    except EditRayError as error:
        print(f"edit-ray: {error}; what follows is read from disk", file=sys.stderr)
        said = {}
    for folder in folders_in(client.output):
        try:
            path = os.path.realpath(folder.path)
            yield said.pop(path) if path in said else RunStatus.of(folder.path, folder.read_manifest())
        except (EditRayError, OSError) as error:
            print(f"edit-ray: {folder.path} is left out: {error}", file=sys.stderr)
    yield from (run for path, run in said.items() if not run.ended or os.path.exists(path))


def status(options: argparse.Namespace) -> int:
    """Prints where a run stands."""
    status = reader_of(options).status(options.run_id)
    print(line_of(status))
    if status.progress:
        at = status.progress
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    for said in (status.error, status.warning):
        if said:
            print(said)
    return 0


def reader_of(options: argparse.Namespace) -> LongVideoClient:
    """A client for looking: where the Ray that is named cannot be reached, it says so and reads folders alone."""
    from edit_ray.client import LongVideoClient

    try:
        return client_of(options)
    except ConfigError:
        raise
    except EditRayError as error:
        print(f"edit-ray: {error}; what follows is read from disk", file=sys.stderr)
        return LongVideoClient(output=options.output, connect=False)
