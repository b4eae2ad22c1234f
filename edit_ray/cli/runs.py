"""Commands about runs and actors."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, UnknownRun
from edit_ray.runs.ids import RUN_ID_PATTERN

if TYPE_CHECKING:
    from edit_ray.actors.messages import RunStatus
    from edit_ray.cache.records import Record
    from edit_ray.client import LongVideoClient


def down(options: argparse.Namespace) -> int:
    from edit_ray.actors import launch

    if not launch.connect_if_running(options.address):
        print("no Ray is running")
        return 0
    ended = launch.end_actors()
    print(f"ended: {', '.join(ended)}" if ended else "no actors were alive")
    return 0


def list_runs(options: argparse.Namespace) -> int:
    for status in _client(options).runs():
        print(line_of(status))
    return 0


def status(options: argparse.Namespace) -> int:
    status = _client(options).status(options.run_id)
    print(line_of(status))
    if status.progress:
        at = status.progress
        print(f"segment {at.segment_index}: step {at.step} of {at.num_steps}")
    if status.error:
        print(status.error)
    return 0


def cancel(options: argparse.Namespace) -> int:
    _client(options).cancel(options.run_id)
    print(f"asked {options.run_id} to stop")
    return 0


def resume(options: argparse.Namespace) -> int:
    client = _client(options)
    print(line_of(client.resume(options.run_id, allow_different_hardware=options.allow_different_hardware)))
    return 0


def extend(options: argparse.Namespace) -> int:
    client, allow = _client(options), options.allow_different_hardware
    print(line_of(client.extend(options.run_id, options.segments, allow_different_hardware=allow)))
    return 0


def reroll(options: argparse.Namespace) -> int:
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


def report(options: argparse.Namespace) -> int:
    from edit_ray.cache.report import render_report
    from edit_ray.config import output_root

    source = Path(options.source)
    if not source.exists():
        if re.fullmatch(RUN_ID_PATTERN, options.source) is None:
            raise UnknownRun(f"{options.source} is no file, no folder and no run's id")
        source = output_root(options.output, os.environ) / options.source
    page = options.page or (source / "report.html" if source.is_dir() else source.with_suffix(".html"))
    text = render_report(_read_records(source), f"What the cache did in {source.resolve().stem}")
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"the page {page} cannot be written: {error.strerror}"]) from None
    print(page)
    return 0


def _read_records(source: Path) -> dict[str, Record]:
    """The records of a run's folder by segment, or the one in a file. Raises UnknownRun, ConfigError."""
    from edit_ray.cache.records import Record

    files = sorted((source / "records").glob("*.json")) if source.is_dir() else [source]
    if not source.exists() or not files:
        raise UnknownRun(
            f"{source} is no record and no run with records; a run has some if its cache.policy is not none"
        )
    records = {}
    for file in files:
        try:
            records[_title(file.stem)] = Record.from_json(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError([f"{file} cannot be read: {error}"]) from None
    return records


def _title(stem: str) -> str:
    """`segment 3` for 00003-t0, `segment 3, take 1` for 00003-t1; any other name is its own."""
    match = re.fullmatch(r"([0-9]{5,})-t([0-9]+)", stem)
    if match is None:
        return stem
    segment, take = map(int, match.groups())
    return f"segment {segment}, take {take}" if take else f"segment {segment}"
