"""`edit-ray report`: a run, or a record of a cache's decisions, as one HTML page."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, UnknownRun
from edit_ray.runs.ids import RUN_ID_PATTERN

if TYPE_CHECKING:
    from edit_ray.cache.records import Record

_SEGMENT = re.compile(r"([0-9]+)(?:-t([0-9]+))?")


def report(options: argparse.Namespace) -> int:
    """Writes the page of a record, of a folder or of a run."""
    from edit_ray.config import output_root

    source = Path(options.source)
    if not source.exists():
        if re.fullmatch(RUN_ID_PATTERN, options.source) is None:
            raise UnknownRun(f"{options.source} is no file, no folder and no run's id")
        source = output_root(options.output, os.environ) / options.source
    page = options.page or (source / "report.html" if source.is_dir() else source.with_suffix(".html"))
    text = _page_of(source.resolve())
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"the page {page} cannot be written: {error.strerror}"]) from None
    print(page)
    return 0


def _page_of(source: Path) -> str:
    from edit_ray.cache.records import render_report

    run = _page_of_run(source) if source.is_dir() else None
    if run is not None:
        return run
    records = _read_records(source)
    if not records:
        raise UnknownRun(
            f"{source} is no record and no run with records; a run has some if its cache.policy is not none"
        )
    return render_report(records, f"What the cache did in {source.stem}")


def _page_of_run(folder: Path) -> str | None:
    """The page of a run with committed segments; None where records are all that is there.

    Raises ConfigError, and UnknownRun for a run that has nothing to be told yet.
    """
    from edit_ray.config import load_config
    from edit_ray.page.drawing import MOST_SEGMENTS, ends_of, sampled
    from edit_ray.page.run_page import render_run
    from edit_ray.runs.event_log import read_events
    from edit_ray.runs.folder import RunFolder
    from edit_ray.video.encode import EncodeError

    if re.fullmatch(RUN_ID_PATTERN, folder.name) is None:
        return None
    try:
        manifest = RunFolder(folder.parent, folder.name).read_manifest()
    except UnknownRun:
        return None
    except ValueError as error:
        raise ConfigError([f"{folder} cannot be reported: {error}"]) from None
    if not manifest.segments:
        if next((folder / "records").glob("*.json"), None) is not None:
            return None
        raise UnknownRun(
            f"run {folder.name!r} has committed no segment yet (its state: {manifest.state}); "
            "there is a report from the first one on"
        )
    settings = folder / "run.yaml"
    sampling = load_config(settings, check_model=False).sampling
    pictures = []
    for segment in (manifest.segments[index] for index in sampled(len(manifest.segments), MOST_SEGMENTS)):
        part, init = folder / segment.media, folder / "init.mp4"
        if part.is_file():  # `output.keep_segments` may have dropped it
            try:
                urls = ends_of(part, init, height=sampling.height, width=sampling.width)
            except EncodeError as error:
                raise ConfigError([f"{part} cannot be read: {error}"]) from None
            pictures.append((segment.index, urls))
    return render_run(
        folder.name,
        manifest.state,
        settings.read_text(),
        [replace(segment, statistics=dict(segment.statistics)) for segment in manifest.segments],
        records=_read_records(folder),
        pictures=pictures,
        events=read_events(folder / "events.jsonl"),
    )


def _read_records(source: Path) -> dict[str, Record]:
    """The records of a run's folder by segment, or the one in a file. Raises ConfigError."""
    from edit_ray.cache.records import Record

    files = sorted((source / "records").glob("*.json")) if source.is_dir() else [source]
    records = {}
    for file in files:
        try:
            records[_heading(file.stem)] = Record.from_json(file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError([f"{file} cannot be read: {error}"]) from None
    return records


def _heading(name: str) -> str:
    match = _SEGMENT.fullmatch(name)
    if match is None:
        return name
    segment, take = match.groups()
    return f"segment {int(segment)}" + (f", take {int(take)}" if take and int(take) else "")
