"""Commands that list, stop, continue and remove runs, or end the actors."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, EditRayError, ResourcesUnavailable, RunLive
from edit_ray.runs.ids import check_run_id

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.client import LongVideoClient

_AGE = re.compile(r"([0-9]{1,6})([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def list_runs(options: argparse.Namespace) -> int:
    """Print one line per run on disk or in this Ray cluster."""
    client = reader_of(options)
    runs = list(known_runs(client))
    shown = [run for run in runs if options.all or client.owner.owns(run.owner)]
    for run in shown:
        print(line_of(run, owner=options.all))
    if hidden := len(runs) - len(shown):
        print(f"{hidden} more of other owners: --all shows them")
    elif not shown:
        print(f"no runs in {client.output}")
    return 0


def known_runs(client: LongVideoClient) -> Iterator[RunStatus]:
    """The runs on disk, oldest first, then those elsewhere; the segment scheduler's status wins over the folder's."""
    from edit_ray.actors.messages import RunStatus
    from edit_ray.runs.folder import folders_in

    try:
        active = {os.path.realpath(run.path): run for run in client.runs()}
    except EditRayError as error:
        _warn_from_disk(error)
        active = {}
    for folder in folders_in(client.output):
        try:
            path = os.path.realpath(folder.path)
            yield active.pop(path) if path in active else RunStatus.of(folder.path, folder.read_manifest())
        except (EditRayError, OSError) as error:
            print(f"edit-ray: {folder.path} is left out: {error}", file=sys.stderr)
    yield from (run for path, run in active.items() if not run.ended or os.path.exists(path))


def status(options: argparse.Namespace) -> int:
    """Print the state of a run."""
    status = reader_of(options).status(options.run_id)
    print(line_of(status))
    if at := status.progress:
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    for text in filter(None, (_held(status), status.error, status.warning)):
        print(text)
    return 0


def _held(status: RunStatus) -> str | None:
    """What a run waits for, in a sentence."""
    run_id, last = status.run_id, status.committed - 1
    waits = {
        "pause": f"paused: no further segment begins before `edit-ray unpause {run_id}`",
        "approval": f"waits for `edit-ray approve {run_id} --segment {last}`, or for `edit-ray reroll {run_id}`",
        "clients": "waits until a client has taken more segments (engine.max_ahead)",
    }
    return waits.get(status.held_by or "")


def down(options: argparse.Namespace) -> int:
    """End every edit_ray actor. Ask first while runs are active."""
    from edit_ray.actors import connection, launch

    if not connection.connect_if_running(options.address):
        print("no Ray is running")
        return 0
    if not options.force:
        _check_nobody_works(client_of(options))
    ended = launch.end_actors()
    print(f"ended: {', '.join(ended)}" if ended else "no actors were alive")
    return 0


def _check_nobody_works(client: LongVideoClient) -> None:
    """Raise NotYourRun, or RunLive if runs are active and the user does not confirm."""
    try:
        live = [run for run in client.runs() if not run.ended]
    except EditRayError as error:
        raise ResourcesUnavailable(f"{error}; `edit-ray down --force` ends the actors without asking them") from None
    for run in live:
        print(line_of(run, owner=True))
    for run in live:
        client.check_mine(run)
    count = f"{len(live)} run{'s are' if len(live) > 1 else ' is'} active"
    if live and not confirmed(f"{count}. End them? Committed segments stay, and `edit-ray resume` continues."):
        raise RunLive(f"{count}, and nothing was ended; wait, `edit-ray cancel` them, or give --force")


def cancel(options: argparse.Namespace) -> int:
    """Ask a run to stop."""
    client = client_of(options)
    status = client.status(options.run_id)
    if status.ended:
        print(f"{options.run_id} has ended already: {status.state}")
        return 0
    client.cancel(options.run_id, force=options.force)
    print(f"asked {options.run_id} to stop; `edit-ray resume {options.run_id}` continues it")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Continue a run at its first uncommitted segment."""
    client = _lasting_client(options)
    print(line_of(client.resume(options.run_id, remake_damaged=options.remake_damaged, **_allowed(options))))
    return 0


def extend(options: argparse.Namespace) -> int:
    """Add segments to an ended run."""
    print(line_of(_lasting_client(options).extend(options.run_id, options.segments, **_allowed(options))))
    return 0


def reroll(options: argparse.Namespace) -> int:
    """Generate segments of an ended run again."""
    changes = {"seed": options.seed, "prompt": options.prompt, **_allowed(options)}
    print(line_of(_lasting_client(options).reroll(options.run_id, options.start, **changes)))
    return 0


def steer(options: argparse.Namespace) -> int:
    """Edit the storyboard of an active run."""
    said = {name: getattr(options, name) for name in ("prompt", "negative_prompt", "guidance_scale", "seed")}
    edit = client_of(options).steer(options.run_id, options.start, **said, force=options.force)
    print(f"{options.run_id}: it holds from segment {edit.start} on")
    return 0


def pause(options: argparse.Namespace) -> int:
    """Let no further segment of a run begin."""
    print(line_of(client_of(options).pause(options.run_id, force=options.force)))
    return 0


def unpause(options: argparse.Namespace) -> int:
    """Let further segments of a run begin again."""
    print(line_of(client_of(options).unpause(options.run_id, force=options.force)))
    return 0


def approve(options: argparse.Namespace) -> int:
    """Approve segments of a run that waits for it."""
    print(line_of(client_of(options).approve(options.run_id, options.segment, force=options.force)))
    return 0


def branch(options: argparse.Namespace) -> int:
    """Start a new run that shares the first segments of another one."""
    client = client_of(options)
    client.status(options.run_id)
    _check_ray_runs(options)
    names = ("new_id", "prompt", "seed", "num_segments", "allow_different_hardware")
    print(line_of(client.branch(options.run_id, options.at, **{name: getattr(options, name) for name in names})))
    return 0


def _allowed(options: argparse.Namespace) -> dict[str, bool]:
    return {"allow_different_hardware": options.allow_different_hardware, "force": options.force}


def _lasting_client(options: argparse.Namespace) -> LongVideoClient:
    """A client of a Ray cluster that outlives this command. Raises NotYourRun, ResourcesUnavailable."""
    client = client_of(options)
    client.check_mine(client.status(options.run_id), options.force)
    _check_ray_runs(options, f", or continue with `python jobs/long_video.py --run-id {options.run_id} --resume`")
    return client


def _check_ray_runs(options: argparse.Namespace, otherwise: str = "") -> None:
    """Raise ResourcesUnavailable if there is no Ray cluster that outlives this command."""
    from edit_ray.actors import connection

    if not connection.connect_if_running(options.address):
        raise ResourcesUnavailable(f"no Ray is running: start one with `ray start --head`{otherwise}")


def delete(options: argparse.Namespace) -> int:
    """Remove one inactive run."""
    client = reader_of(options)
    status = client.status(check_run_id(options.run_id))
    client.check_mine(status, options.force)
    if not status.ended and status.state != "open":
        raise RunLive(f"run {status.run_id!r} is active; stop it with `edit-ray cancel {status.run_id}` first")
    return _remove_all([status], options)


def prune(options: argparse.Namespace) -> int:
    """Remove the user's own runs whose manifest has not changed for some time."""
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
    """Remove the runs after confirmation. A run that cannot be removed does not keep the others."""
    from edit_ray.actors.folder_state import remove_with_residuals
    from edit_ray.runs.folder import RunFolder, size_of

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
            remove_with_residuals(folder)
            print(f"removed {folder.path}")
        except (EditRayError, OSError) as error:
            failed = True
            print(f"edit-ray: {folder.path} stays: {error}", file=sys.stderr)
    return 1 if failed else 0


def client_of(options: argparse.Namespace) -> LongVideoClient:
    """A client of the running Ray cluster, if any."""
    from edit_ray.client import LongVideoClient

    return LongVideoClient(output=options.output, address=options.address)


def reader_of(options: argparse.Namespace) -> LongVideoClient:
    """A client for reading: if the named Ray cluster does not answer, it warns and reads folders only."""
    from edit_ray.client import LongVideoClient

    try:
        return client_of(options)
    except ConfigError:
        raise
    except EditRayError as error:
        _warn_from_disk(error)
        return LongVideoClient(output=options.output, connect=False)


def _warn_from_disk(error: EditRayError) -> None:
    print(f"edit-ray: {error}; the following is read from disk", file=sys.stderr)


def line_of(status: RunStatus, owner: bool = False) -> str:
    """A run's id, state, progress, folder and, if asked for, owner in one line."""
    total = "∞" if status.num_segments is None else status.num_segments
    line = f"{status.run_id}  {status.state}  {status.committed}/{total} segments  {status.path}"
    return f"{line}  {status.owner or 'nobody'}" if owner else line


def confirmed(question: str) -> bool:
    """Whether the user confirms; False without a terminal."""
    return sys.stdin.isatty() and input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
