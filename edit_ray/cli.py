"""`edit-ray`: a look at the runs and an end to the actors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edit_ray.errors import EditRayError


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0 done, 1 failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except EditRayError as error:
        print(f"edit-ray: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | LookupError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edit-ray", description="Looks after the actors and runs of edit_ray.")
    parser.add_argument("--address", help="the Ray to join (default: the one that Ray itself finds)")
    parser.add_argument("--output", help="the folder that holds runs (default: $EDIT_RAY_OUTPUT or ~/edit_ray_outputs)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("down", help="end all actors; runs in progress end where they are")
    commands.add_parser("list", help="the runs that the segment scheduler knows")
    for name, says in (("status", "where one run stands"), ("cancel", "stop one run; what is committed stays")):
        commands.add_parser(name, help=says).add_argument("run_id")
    return parser


def _down(options: argparse.Namespace) -> int:
    from edit_ray.actors import launch

    if not launch.connect_if_running(options.address):
        print("no Ray is running")
        return 0
    ended = launch.end_actors()
    print(f"ended: {', '.join(ended)}" if ended else "no actors were alive")
    return 0


def _list(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    for status in LongVideoClient(output=options.output, address=options.address).runs():
        print(f"{status.run_id}  {status.state}  {status.committed}/{status.num_segments} segments  {status.path}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    status = LongVideoClient(output=options.output, address=options.address).status(options.run_id)
    print(f"{status.run_id}  {status.state}  {status.committed}/{status.num_segments} segments  {status.path}")
    if status.progress:
        at = status.progress
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    if status.error:
        print(status.error)
    return 0


def _cancel(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    LongVideoClient(output=options.output, address=options.address).cancel(options.run_id)
    print(f"asked {options.run_id} to stop")
    return 0


_COMMANDS = {"down": _down, "list": _list, "status": _status, "cancel": _cancel}

if __name__ == "__main__":
    sys.exit(main())
