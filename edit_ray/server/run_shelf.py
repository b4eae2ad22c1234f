"""Runs as a replica reads them: from their folders, and while they are active from the segment scheduler.

What was read is kept for the next request, so that a poll costs what is new. A replica holds nothing else: every other
replica answers the same.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Protocol

from edit_ray.actors.messages import RunStatus
from edit_ray.config import Config, load_config
from edit_ray.errors import ConfigError, EditRayError, UnknownRun
from edit_ray.runs.folder import RunFolder, folders_in
from edit_ray.runs.ids import Owner, check_run_id
from edit_ray.runs.manifest import Manifest
from edit_ray.runs.manifest_file import ManifestReader
from edit_ray.runs.run_plan import Edit
from edit_ray.server.refusals import Refusal, refuse
from edit_ray.server.scheduler_answers import STATUS_AGE_S, SchedulerAnswers
from edit_ray.server.video_object import RunView

KEPT = 128  # runs that are kept read, each with its manifest
NEW_S = 5.0  # the age of a run that the segment scheduler must know


class Runs(Protocol):
    """What the door needs of `LongVideoClient`, which is the one that it has on a cluster."""

    output: Path
    owner: Owner

    def submit(self, config: Config, *, run_id: str | None = None, checked: bool = False) -> str:
        """Start a run."""

    def resume(self, run_id: str) -> RunStatus:
        """Continue a run."""

    def status(self, run_id: str) -> RunStatus:
        """The status of a run."""

    def runs(self) -> list[RunStatus]:
        """The runs that the segment scheduler knows."""

    def cancel(self, run_id: str) -> None:
        """Stop a run."""

    def reroll(self, run_id: str, start: int, *, seed: int | None = None, prompt: str | None = None) -> RunStatus:
        """Make segments again."""

    def branch(
        self,
        run_id: str,
        at: int,
        *,
        new_id: str | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        num_segments: int | None = None,
        request: str | None = None,
    ) -> RunStatus:
        """Start a run that shares the segments before `at`."""

    def steer(
        self,
        run_id: str,
        from_segment: int | None = None,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        request: str | None = None,
    ) -> Edit:
        """Edit the storyboard of a run that is being made."""

    def pause(self, run_id: str) -> RunStatus:
        """Let no further segment begin."""

    def unpause(self, run_id: str) -> RunStatus:
        """Let further segments begin again."""

    def approve(self, run_id: str, segment: int | None = None) -> RunStatus:
        """Approve the segments up to this one."""

    def check_mine(self, status: RunStatus) -> None:
        """Raise NotYourRun."""


@dataclass
class _Kept:
    """What was read of one run; `lock` is held while it is read."""

    folder: RunFolder
    reader: ManifestReader
    lock: Lock = field(default_factory=Lock)
    config: tuple[int, Config | None] = (-1, None)  # with the time of the file's last change
    view: RunView | None = None
    viewed_at: float = -math.inf  # monotonic seconds


class RunShelf:
    """Reads the runs of `runs.output`. Any thread may call it."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = Lock()
        self._scheduler = SchedulerAnswers(runs)

    def view(self, run_id: str, fresh: bool = False) -> RunView:
        """The run now; `fresh` asks the segment scheduler in any case.

        Raises Refusal if there is none, NotYourRun, ManifestUnreadable.
        """
        return self._view(self._known(run_id), fresh=fresh)

    def recent(self, run_id: str) -> tuple[RunFolder, RunView]:
        """The run's folder, and a view of it that may be a moment old: many readers that follow a run share one.

        That a run has ended is looked at anew: it may have been continued since, and nobody asks again about an end.
        """
        kept, now = self._known(run_id), time.monotonic()
        if kept.view is None or kept.view.manifest.end is not None or now - kept.viewed_at > STATUS_AGE_S:
            kept.view, kept.viewed_at = self._view(kept), now
        return kept.folder, kept.view

    def queued(self) -> int:
        """How many runs wait for a GPU actor."""
        return sum(status.state == "queued" for status in self._scheduler.known().values())

    def manifest(self, run_id: str) -> tuple[RunFolder, Manifest]:
        """The run's folder and manifest, without a question to the segment scheduler. Raises as `view`."""
        kept = self._known(run_id)
        return kept.folder, self._manifest_of(kept)

    def ids(self) -> list[str]:
        """The ids of all runs, the newest first, whoever owns them."""
        return [folder.run_id for folder in reversed(folders_in(self.runs.output))]

    def view_if_mine(self, run_id: str) -> RunView | None:
        """The run without its step, unless it is another owner's, was removed meanwhile, or cannot be read.

        One question to the segment scheduler serves for all runs of a list.
        """
        with contextlib.suppress(Refusal, EditRayError, OSError):
            return self._view(self._known(run_id), listed=True)
        return None

    def forget(self, run_id: str) -> None:
        """The run was removed."""
        with self._lock:
            self._kept.pop(run_id, None)

    def _known(self, run_id: str) -> _Kept:
        try:
            folder = RunFolder(self.runs.output, check_run_id(run_id))
        except ConfigError:
            raise refuse("video_not_found", "There is no video of this id.") from None
        with self._lock:
            kept = self._kept.setdefault(run_id, _Kept(folder, ManifestReader(folder.manifest)))
            self._kept.move_to_end(run_id)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return kept

    def _manifest_of(self, kept: _Kept) -> Manifest:
        try:
            manifest = kept.folder.read_manifest(kept.reader)
        except UnknownRun:
            self.forget(kept.folder.run_id)
            raise refuse("video_not_found", "There is no video of this id.") from None
        if manifest.begun.run_id != kept.folder.run_id:
            raise refuse("video_damaged", "The manifest of this video is that of another one.")
        self.runs.check_mine(RunStatus.of(kept.folder.path, manifest))
        return manifest

    def _view(self, kept: _Kept, *, listed: bool = False, fresh: bool = False) -> RunView:
        with kept.lock:
            manifest, config = self._manifest_of(kept), self._config_of(kept)
        status = RunStatus.of(kept.folder.path, manifest)
        created_at, changed_at = (_time_of(path) for path in (kept.folder.run_yaml, kept.folder.manifest))
        if manifest.end is None and (known := self._scheduled(kept, created_at, listed, fresh)) is not None:
            # The manifest is newer: what it counts is there.
            status = replace(known, committed=status.committed, dropped_before=status.dropped_before)
        return RunView(manifest, status, config, created_at, changed_at, self._position(status))

    def _scheduled(self, kept: _Kept, created_at: float, listed: bool, fresh: bool) -> RunStatus | None:
        """The segment scheduler's status, with the step unless it is `listed`; None if it does not know the run."""
        path = os.path.realpath(kept.folder.path)
        known = self._scheduler.known(fresh=fresh).get(path)
        if known is None and not fresh and time.time() - created_at < NEW_S:  # another replica has begun it since
            known = self._scheduler.known(fresh=True).get(path)
        if known is None or listed:
            return known
        return self._scheduler.status(kept.folder.run_id, fresh=fresh) or known

    def _config_of(self, kept: _Kept) -> Config | None:
        try:
            changed = kept.folder.run_yaml.stat().st_mtime_ns
            if kept.config[0] != changed:
                kept.config = changed, load_config(kept.folder.run_yaml, check_model=False)
        except (EditRayError, OSError):
            kept.config = -1, None
        return kept.config[1]

    def _position(self, status: RunStatus) -> int | None:
        """The position of a run that waits among those that wait."""
        if status.state != "queued":
            return None
        path, known = os.path.realpath(status.path), self._scheduler.known()
        waiting = [other for other, run in known.items() if run.state == "queued"]
        return waiting.index(path) if path in waiting else None


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
