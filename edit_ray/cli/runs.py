"""Commands about runs and actors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.client import LongVideoClient


def down(options: argparse.Namespace) -> int:
    """Ends every actor of ours."""
    from edit_ray.actors import launch

    if not launch.connect_if_running(options.address):
        print("no Ray is running")
        return 0
    ended = launch.end_actors()
    print(f"ended: {', '.join(ended)}" if ended else "no actors were alive")
    return 0


def list_runs(options: argparse.Namespace) -> int:
    """Prints a line for each run that is remembered."""
    for status in _client(options).runs():
        print(line_of(status))
    return 0


def status(options: argparse.Namespace) -> int:
    """Prints where a run stands."""
    status = _client(options).status(options.run_id)
    print(line_of(status))
    if status.progress:
        at = status.progress
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    for said in (status.error, status.warning):
        if said:
            print(said)
    return 0


def cancel(options: argparse.Namespace) -> int:
    """Asks a run to stop."""
    _client(options).cancel(options.run_id)
    print(f"asked {options.run_id} to stop")
    return 0


def resume(options: argparse.Namespace) -> int:
    """Goes on with a run at its first segment that is not committed."""
    client = _client(options)
    print(line_of(client.resume(options.run_id, allow_different_hardware=options.allow_different_hardware)))
    return 0


def extend(options: argparse.Namespace) -> int:
    """Gives a run that has ended more segments."""
    client, allow = _client(options), options.allow_different_hardware
    print(line_of(client.extend(options.run_id, options.segments, allow_different_hardware=allow)))
    return 0


def reroll(options: argparse.Namespace) -> int:
    """Makes segments of a run that has ended again."""
    status = _client(options).reroll(
        options.run_id,
        options.start,
        seed=options.seed,
        prompt=options.prompt,
        allow_different_hardware=options.allow_different_hardware,
    )
    print(line_of(status))
    return 0


def line_of(status: RunStatus) -> str:
    """A run in one line: its id, its state, how far it is, where it lies."""
    total = "∞" if status.num_segments is None else status.num_segments
    return f"{status.run_id}  {status.state}  {status.committed}/{total} segments  {status.path}"


def _client(options: argparse.Namespace) -> LongVideoClient:
    from edit_ray.client import LongVideoClient

    return LongVideoClient(output=options.output, address=options.address)
