"""Steering: what a client may say of a run that is active, as one line of its manifest each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edit_ray.actors.live_run import LiveRun
from edit_ray.errors import ConfigError
from edit_ray.runs.manifest import Approved, Edited, Manifest, Paused, Steering
from edit_ray.runs.run_plan import EDITABLE, Edit

MAX_CHANGES = 10_000  # of a run's storyboard, as many as it may have prompts

Said = Callable[[LiveRun, int], Steering | None]
"""Makes the line from the run and its first segment that has not begun; None: the manifest says so already."""


def edit(from_segment: int | None, said: Mapping[str, Any], request: str) -> Said:
    """What is `said` (as `read_edit` returns it) holds from `from_segment` on, if that has not begun."""
    return partial(_edit, from_segment, said, request)


def pause(paused: bool) -> Said:
    """No further segment begins, or they begin again."""
    return partial(_pause, paused)


def approve(segment: int | None) -> Said:
    """The segments up to this one, by default the latest committed one, are as they should be."""
    return partial(_approve, segment)


def edit_for(manifest: Manifest, request: str) -> Edit | None:
    """The edit that a request has made."""
    edits = (change for change in reversed(manifest.changes) if isinstance(change, Edit))
    return next((edit for edit in edits if request and edit.request == request), None)


def _edit(from_segment: int | None, said: Mapping[str, Any], request: str, run: LiveRun, begun: int) -> Edited | None:
    """Raise ConfigError where it cannot hold."""
    manifest, run_id = run.manifest, run.spec.run_id
    if edit_for(manifest, request) is not None:
        return None
    committed, segments = len(manifest.segments), manifest.num_segments
    again = (
        f"`edit-ray reroll {run_id} --from K` makes it again once the run waits or has ended, and `edit-ray branch "
        f"{run_id} --at K` starts another run from it on"
    )
    start = begun if from_segment is None else from_segment
    problem = ""
    if not said:
        problem = f"an edit says nothing; it must have at least one of {', '.join(EDITABLE)}"
    elif type(start) is not int or start < 0:
        problem = f"from_segment is {from_segment!r}; it must be a whole number of at least 0"
    elif segments is not None and begun >= segments:
        problem = f"all {segments} segments of run {run_id!r} have begun: {again}"
    elif start < committed:
        problem = f"from_segment is {start}, which is committed; the next that can be edited is {begun}: {again}"
    elif segments is not None and start >= segments:
        problem = f"from_segment is {start}; the last segment of run {run_id!r} is {segments - 1}"
    elif len(manifest.changes) >= MAX_CHANGES:
        problem = f"run {run_id!r} was edited {MAX_CHANGES} times, which is the most; branch it"
    if problem:
        raise ConfigError([problem])
    return Edited(run.spec.incarnation, Edit(max(start, begun), **said, request=request))


def _pause(paused: bool, run: LiveRun, begun: int) -> Paused | None:
    return Paused(run.spec.incarnation, paused) if run.manifest.paused != paused else None


def _approve(segment: int | None, run: LiveRun, begun: int) -> Approved | None:
    """Raise ConfigError where there is nothing to approve."""
    committed, run_id = len(run.manifest.segments), run.spec.run_id
    if run.spec.config.video.approve == "none":
        raise ConfigError([f"run {run_id!r} does not wait for a yes: its video.approve is none"])
    last = committed - 1 if segment is None else segment
    if not committed:
        raise ConfigError([f"run {run_id!r} has no committed segment yet that could be approved"])
    if type(last) is not int or not 0 <= last < committed:
        raise ConfigError([f"segment is {segment!r}; it must be a committed one, from 0 to {committed - 1}"])
    return Approved(run.spec.incarnation, last + 1) if last >= run.manifest.approved else None
