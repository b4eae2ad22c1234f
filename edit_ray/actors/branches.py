"""A branch: a new run that shares the first segments of another one. What its manifest begins with, and which files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_ray.actors.folder_state import (
    Provenance,
    can_be_made,
    can_be_made_again,
    damage_of,
    refusal,
    shortage_after,
    shortage_before,
)
from edit_ray.actors.messages import RunSpec
from edit_ray.config import read_edit
from edit_ray.errors import ConfigError, RunDamaged
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.ids import MAX_REQUEST, MAX_SEGMENTS
from edit_ray.runs.manifest import (
    Approved,
    Committed,
    Dropped,
    Edited,
    Line,
    Manifest,
    Opened,
    Records,
    SegmentRecord,
    Tiled,
)
from edit_ray.runs.run_plan import Edit, said_by


@dataclass(frozen=True)
class BranchAsked:
    """A client's request for a new run `run_id` in `root`, which shares the segments before `at` of the run `source`.

    `said` holds from there on in place of the storyboard's. `num_segments` None: as many as the source has. A client
    that asks again, after its answer was lost, is recognised by `token`.
    """

    run_id: str
    root: Path
    source: str
    at: int
    token: str
    said: Mapping[str, Any]
    num_segments: int | None = None
    owner: str = ""
    job: str = ""


def planned(asked: BranchAsked, source: RunSpec, manifest: Manifest) -> tuple[RunSpec, Edit | None]:
    """The branch as it will be, and what is asked of it besides. Raises ConfigError with all mistakes, ModelError."""
    problems, said = [], dict[str, Any]()
    committed, first = len(manifest.segments), manifest.dropped_before
    while first < committed and not can_be_made(source, first):
        first += 1
    if type(asked.at) is not int or not (asked.at == 0 or first <= asked.at <= committed):
        there = f"0 or from {first} to {committed}" if first else f"from 0 to {committed}"
        why = ", as the files of earlier ones were dropped (output.keep_segments)" if first else ""
        problems.append(f"at is {asked.at!r}; it must be {there}, with the run's {committed} committed segments{why}")
    number = source.num_segments if asked.num_segments is None else asked.num_segments
    least = max(1, asked.at) if not problems else 1
    if number is not None and (type(number) is not int or not least <= number <= MAX_SEGMENTS):
        problems.append(f"num_segments is {number!r}; it must be from {least} to {MAX_SEGMENTS}")
    if number != source.num_segments and (last := source.config.prompt_segments[-1].last_image) is not None:
        problems.append(
            f"num_segments is {number!r}; it must be {source.num_segments} as in the run, which ends with {last!r} "
            "(last_image of its last prompt)"
        )
    if not 0 < len(asked.token) <= MAX_REQUEST:
        problems.append(f"request has {len(asked.token)} characters; it must have 1 to {MAX_REQUEST}")
    try:
        said = read_edit(source.config, asked.said)
    except ConfigError as mistakes:
        problems += mistakes.problems
    if problems:
        raise ConfigError(problems)
    spec = replace(source, run_id=asked.run_id, num_segments=number, submission=asked.token)
    return spec, Edit(asked.at, **said) if said else None


def shared_files(source: RunFolder, manifest: Manifest, at: int) -> dict[str, Path]:
    """The files of the segments before `at` by their names in the branch, where all segments are of the first take."""
    shared = {"init.mp4": source.init} if at else {}
    for record in manifest.segments[:at]:
        kept, record_file = record.index >= manifest.dropped_before, source.record(record.index, record.take)
        for path in (source.path / record.latents, source.path / record.media, record_file):
            if path.exists() or (kept and path != record_file):
                shared[f"{path.parent.name}/{_of_first_take(path.name)}"] = path
    if at and source.init_latents.exists():
        shared["latents/init.safetensors"] = source.init_latents
    return shared


def lines_of(
    asked: BranchAsked, spec: RunSpec, edit: Edit | None, source: RunSpec, manifest: Manifest, here: Provenance
) -> Iterator[Line]:
    """The lines with which its manifest begins.

    The reuse plan continues that of the source if that was never made anew; else it begins with the branch.
    """
    at = asked.at
    begun = spec.begun(asked.token, manifest.provenance if at else here, asked.owner, asked.job)
    yield replace(begun, branched_from=source.run_id)
    for change in manifest.changes:
        yield Edited(1, Edit(change.start, **said_by(change)))
    if edit is not None:
        yield Edited(1, edit)
    if manifest.tiled_from is not None and manifest.tiled_from < at:
        yield Tiled(1, manifest.tiled_from)
    for record in manifest.segments[:at]:
        latents, media = _of_first_take(record.latents), _of_first_take(record.media)
        statistics = dict(record.statistics)
        yield Committed(1, replace(record, take=0, latents=latents, media=media, statistics=statistics))
    if before := min(manifest.dropped_before, at):
        yield Dropped(1, before)
    if at and source.config.video.approve == "each":
        yield Approved(1, at)
    if at and source.config.cache.reuse_window and (manifest.replanned or not can_be_made_again(source, at)):
        yield Opened(2, begun.provenance, replans=True)


def check_shared(source: RunFolder, manifest: Manifest, at: int) -> None:
    """Raise RunDamaged if a file of the segments before `at` is not as it was written."""
    if damaged := damage_of(source, replace(manifest, segments=Records(manifest.segments[:at]))):
        raise RunDamaged(refusal(source.run_id, damaged))


def shortage_of(branch: RunSpec, source: RunSpec, shared: Sequence[SegmentRecord]) -> str | None:
    """A sentence if what the branch will make does not fit on its disk. Raises ModelError."""
    return (
        shortage_after(replace(source, num_segments=branch.num_segments), shared) if shared else shortage_before(branch)
    )


def _of_first_take(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem.rpartition('-t')[0]}-t0.{ending}"
