"""Commands about runs and actors."""

from __future__ import annotations

import argparse


def down(options: argparse.Namespace) -> int:
    from edit_ray.actors import launch

    if not launch.connect_if_running(options.address):
        print("no Ray is running")
        return 0
    ended = launch.end_actors()
    print(f"ended: {', '.join(ended)}" if ended else "no actors were alive")
    return 0


def list_runs(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    for status in LongVideoClient(output=options.output, address=options.address).runs():
        print(f"{status.run_id}  {status.state}  {status.committed}/{status.num_segments} segments  {status.path}")
    return 0


def status(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    status = LongVideoClient(output=options.output, address=options.address).status(options.run_id)
    print(f"{status.run_id}  {status.state}  {status.committed}/{status.num_segments} segments  {status.path}")
    if status.progress:
        at = status.progress
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    if status.error:
        print(status.error)
    return 0


def cancel(options: argparse.Namespace) -> int:
    from edit_ray.client import LongVideoClient

    LongVideoClient(output=options.output, address=options.address).cancel(options.run_id)
    print(f"asked {options.run_id} to stop")
    return 0
