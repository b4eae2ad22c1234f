"""`edit-ray verify`: whether a run's files are as they were written."""

from __future__ import annotations

import argparse
import os

from edit_ray.errors import ConfigError, ManifestUnreadable


def verify(options: argparse.Namespace) -> int:
    """Prints each damaged file of a run and returns 1, or one line that all is well."""
    from edit_ray.actors.folder_state import all_damage_of
    from edit_ray.config import output_root
    from edit_ray.runs.folder import RunFolder

    try:
        folder = RunFolder(output_root(options.output, os.environ), options.run_id)
        manifest = folder.read_manifest()
    except ManifestUnreadable as error:
        print(error)
        return 1
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    damaged = all_damage_of(folder, manifest)
    for said in damaged:
        print(said)
    if damaged:
        print(f"{len(damaged)} of {options.run_id} are damaged; `edit-ray resume {options.run_id} --remake-damaged`")
        return 1
    undigested = sum(not record.digests for record in manifest.segments)
    rest = f", {undigested} of which an earlier version wrote without digests" if undigested else ""
    print(f"{options.run_id} is as it was written: {len(manifest.segments)} segments{rest}")
    return 0
