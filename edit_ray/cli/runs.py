"""Commands that change runs, or end the actors."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from edit_ray.errors import EditRayError, ResourcesUnavailable, RunLive

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.client import LongVideoClient


def down(options: argparse.Namespace) -> int:
    """Ends every actor of ours. Runs at work are named, and end only if that is what the user wants."""
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
    """Raises NotYourRun, or RunLive where nobody at a terminal says yes."""
    try:
        live = [run for run in client.runs() if not run.ended]
    except EditRayError as error:
        raise ResourcesUnavailable(f"{error}; `edit-ray down --force` ends the actors without asking them") from None
    for run in live:
        print(line_of(run, owner=True))
    for run in live:
        client.check_mine(run)
    count = f"{len(live)} run{'s are' if len(live) > 1 else ' is'} at work"
    if live and not confirmed(f"{count}. End them? What is committed stays, and `edit-ray resume` goes on."):
        raise RunLive(f"{count}, and nothing was ended; wait, `edit-ray cancel` them, or give --force")


def cancel(options: argparse.Namespace) -> int:
    """Asks a run to stop."""
    client = client_of(options)
    status = client.status(options.run_id)
    if status.ended:
        print(f"{options.run_id} has ended already: {status.state}")
        return 0
    client.cancel(options.run_id, force=options.force)
    print(f"asked {options.run_id} to stop; `edit-ray resume {options.run_id}` goes on with it")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Goes on with a run at its first segment that is not committed."""
    remake = options.remake_damaged
    print(line_of(_going_on(options).resume(options.run_id, remake_damaged=remake, **_allowed(options))))
    return 0


def extend(options: argparse.Namespace) -> int:
    """Gives a run that has ended more segments."""
    print(line_of(_going_on(options).extend(options.run_id, options.segments, **_allowed(options))))
    return 0


def reroll(options: argparse.Namespace) -> int:
    """Makes segments of a run that has ended again."""
    made = {"seed": options.seed, "prompt": options.prompt, **_allowed(options)}
    print(line_of(_going_on(options).reroll(options.run_id, options.start, **made)))
    return 0


def _going_on(options: argparse.Namespace) -> LongVideoClient:
    """A client in a Ray that outlives this command. Raises NotYourRun, ResourcesUnavailable."""
    from edit_ray.actors.connection import connect_if_running

    client = client_of(options)
    client.check_mine(client.status(options.run_id), options.force)
    if not connect_if_running(options.address):
        raise ResourcesUnavailable(
            "no Ray is running: start one with `ray start --head`, or go on with "
            f"`python jobs/long_video.py --run-id {options.run_id} --resume`"
        )
    return client


def _allowed(options: argparse.Namespace) -> dict[str, bool]:
    return {"allow_different_hardware": options.allow_different_hardware, "force": options.force}


def line_of(status: RunStatus, owner: bool = False) -> str:
    """A run in one line: its id, its state, how far it is, where it lies, and whose it is if that is asked for."""
    total = "∞" if status.num_segments is None else status.num_segments
    line = f"{status.run_id}  {status.state}  {status.committed}/{total} segments  {status.path}"
    return f"{line}  {status.owner or 'nobody'}" if owner else line


def client_of(options: argparse.Namespace) -> LongVideoClient:
    """A client of the Ray that runs, if one does."""
    from edit_ray.client import LongVideoClient

    return LongVideoClient(output=options.output, address=options.address)


def confirmed(question: str) -> bool:
    """Whether somebody at a terminal says yes."""
    return sys.stdin.isatty() and input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
