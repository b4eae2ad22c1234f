"""`edit-ray report` and `edit-ray verify`: commands that read a run's folder."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edit_ray.errors import ConfigError, ManifestUnreadable, UnknownRun
from edit_ray.runs.ids import RUN_ID_PATTERN

if TYPE_CHECKING:
    from edit_ray.cache.records import Record

_SEGMENT = re.compile(r"([0-9]+)(?:-t([0-9]+))?")


def verify(options: argparse.Namespace) -> int:
    """Print each damaged file of a run and return 1, or one line if every file is intact."""
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
    for problem in damaged:
        print(problem)
    if damaged:
        print(f"{len(damaged)} of {options.run_id} are damaged; `edit-ray resume {options.run_id} --remake-damaged`")
        return 1
    undigested = sum(not record.digests for record in manifest.segments)
    rest = f", {undigested} of which an earlier version wrote without digests" if undigested else ""
    print(f"{options.run_id} is as it was written: {len(manifest.segments)} segments{rest}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the HTML page of a cache record or of a run."""
    from edit_ray.config import output_root

    source = Path(options.source)
    if not source.exists():
        if re.fullmatch(RUN_ID_PATTERN, options.source) is None:
            raise UnknownRun(f"{options.source} is not a file, a folder or a run id")
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
    from edit_ray.page.decisions import render_report

    if source.is_dir() and (page := _page_of_run(source)) is not None:
        return page
    records = _read_records(source)
    if not records:
        raise UnknownRun(
            f"{source} is neither a record nor a run with records; a run has some if its cache.policy is not none"
        )
    return render_report(records, f"Cache decisions of {source.stem}")


def _page_of_run(folder: Path) -> str | None:
    """The page of a run with committed segments; None for a folder that has only records.

    Raises ConfigError, and UnknownRun for a run without committed segments.
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
            "a report needs at least one"
        )
    settings = folder / "run.yaml"
    sampling = load_config(settings, check_model=False).sampling
    pictures = []
    for segment in (manifest.segments[index] for index in sampled(len(manifest.segments), MOST_SEGMENTS)):
        part = folder / segment.media
        if part.is_file():  # `output.keep_segments` may have dropped it
            try:
                urls = ends_of(part, folder / "init.mp4", height=sampling.height, width=sampling.width)
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
        num_segments=manifest.num_segments,
        fps=sampling.fps,
        events=read_events(folder / "events.jsonl"),
    )


def _read_records(source: Path) -> dict[str, Record]:
    """The records of a run's folder by segment, or the record in a file. Raises ConfigError."""
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
    from edit_ray.page.run_page import heading_of

    match = _SEGMENT.fullmatch(name)
    if match is None:
        return name
    segment, take = match.groups()
    return heading_of(int(segment), int(take or 0))
