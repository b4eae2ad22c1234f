"""`edit-ray watch`: a run as it goes on; live on a terminal, elsewhere one line for each thing that happens."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from edit_ray.cli.runs import line_of
from edit_ray.errors import UnknownRun

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.client import LongVideoClient

LOOK_S = 0.5

_Found = TypeVar("_Found")


def watch(options: argparse.Namespace) -> int:
    """Returns when the run has ended: 0 if it is done, 1 if it is not, or if nobody works on it."""
    from edit_ray.client import LongVideoClient

    client = LongVideoClient(output=options.output, address=options.address)
    follow = _draw if sys.stdout.isatty() else _tell
    last = follow(client, awaited(lambda: client.status(options.run_id), options.wait))
    print(line_of(last))
    if last.error:
        print(last.error)
    return 0 if last.state == "done" else 1


def awaited(look: Callable[[], _Found], wait_s: float) -> _Found:
    """What `look` finds, within `wait_s` seconds of a run that nobody knows yet: a job takes some to begin it.

    Raises UnknownRun.
    """
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            return look()
        except UnknownRun as unknown:
            if time.monotonic() >= deadline:
                raise
            if not told:
                print(f"{unknown}; waiting {wait_s:g} s for it to begin", file=sys.stderr, flush=True)
        told = True
        time.sleep(LOOK_S)


def _still_going(status: RunStatus) -> bool:
    return not status.ended and status.state != "open"


def _tell(client: LongVideoClient, status: RunStatus) -> RunStatus:
    """A line when the state or the number of segments has changed."""
    print(line_of(status), flush=True)
    while _still_going(status):
        time.sleep(LOOK_S)
        now = client.status(status.run_id)
        if (now.state, now.committed) != (status.state, status.committed) and _still_going(now):
            print(line_of(now), flush=True)
        status = now
    return status


def _draw(client: LongVideoClient, status: RunStatus) -> RunStatus:
    """A bar over all denoising steps, with what is left of the time at the pace so far."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(status.run_id, total=None)
        while _still_going(status):
            done, total = steps_of(status)
            bar.update(task, description=description_of(status), completed=done, total=total)
            time.sleep(LOOK_S)
            status = client.status(status.run_id)
    return status


def steps_of(status: RunStatus) -> tuple[float, float | None]:
    """Segments that are denoised, the one at work in part, and how many there will be."""
    at = status.progress
    done = at.segment_index + at.step / at.num_steps if at else float(status.committed)
    return max(done, status.committed), status.num_segments


def description_of(status: RunStatus) -> str:
    """Such as `my-run running: 3/8 segments, segment 4 step 12/30`."""
    total = "∞" if status.num_segments is None else status.num_segments
    at = status.progress
    step = f", segment {at.segment_index} step {at.step}/{at.num_steps}" if at else ""
    return f"{status.run_id} {status.state}: {status.committed}/{total} segments{step}"
