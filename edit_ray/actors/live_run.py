"""One run in the segment scheduler: what it is, what is committed of it, and which clients wait for that."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from edit_ray.actors.folder_state import Damage
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.watchdog import best_effort
from edit_ray.errors import SegmentFailed
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Committed, Dropped, Ended, Line, Manifest
from edit_ray.runs.manifest_file import ManifestFile
from edit_ray.runs.retention import KEEP_ALL, Retention

T = TypeVar("T")
END_ATTEMPTS = 3
CLOSE_S = 1.0  # that an end waits for the manifest's lock to be released


class FolderSilent(SegmentFailed):
    """The run's folder did not answer in time, such as one on a file server that is away."""


@dataclass
class Watched:
    """What clients wait for a change of."""

    changed: asyncio.Condition = field(default_factory=asyncio.Condition, kw_only=True)

    async def notify(self) -> None:
        """Wake all who wait for a change."""
        async with self.changed:
            self.changed.notify_all()

    async def wait(self, there: Callable[[], bool], timeout_s: float) -> bool:
        """Whether a condition came true in time."""
        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(there), timeout_s)
            except TimeoutError:
                return False
        return True


@dataclass
class LiveRun(Watched):
    """A run that this segment scheduler works on or worked on. It holds its manifest's lock until it has ended."""

    spec: RunSpec
    file: ManifestFile
    worker: int | None = None  # its GPU actor
    worked_on: int | None = None  # its GPU actor in an earlier life: the residuals that it reuses are on that node
    may_move: bool = False  # to other hardware (--allow-different-hardware)
    remakes: bool = False  # damaged files (--remake-damaged)
    damaged: Damage = field(default_factory=dict)  # committed files to make again
    final_digest: str | None = None  # of final.mp4, once it exists
    unrecorded: Ended | None = None  # its end, if that could not be written
    consumed: int = 0  # segments, by the client that has consumed the most
    lookback_latents: int = 0  # before a segment, that its decoding may need
    warnings: dict[str, str | None] = field(default_factory=dict)  # by subject: what will fail without intervention
    removed: Retention = KEEP_ALL  # up to which segments this incarnation has removed old files
    stats: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))  # of uncommitted segments
    beginning: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while its GPU actor is prepared
    steering: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a line that steers it is written
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "folder"))

    def __post_init__(self) -> None:
        self.stream = self.spec.stream_files()

    @property
    def folder(self) -> RunFolder:
        return self.spec.folder

    @property
    def manifest(self) -> Manifest:
        return self.file.manifest

    @property
    def end(self) -> Ended | None:
        """How it has ended: as recorded, if that was possible; None while it has not."""
        return self.manifest.end or self.unrecorded

    @property
    def ended(self) -> bool:
        return self.end is not None

    @property
    def warning(self) -> str | None:
        """All warnings for a client, in one line."""
        return "; ".join(said for said in self.warnings.values() if said) or None

    async def on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of work on the run's folder, which is done one piece at a time.

        Raises FolderSilent after `step_timeout_s` without progress. Work in progress continues when the folder answers
        again, and later work waits for it; work that had not started is dropped.
        """
        timeout_s = self.spec.config.engine.step_timeout_s
        done = asyncio.wrap_future(self._disk.submit(work, *arguments))
        try:
            while not done.done():
                before = self.stream.copied
                await asyncio.wait({done}, timeout=timeout_s)
                if not done.done() and self.stream.copied == before:
                    folder = f"the run's folder {self.folder.path}"
                    raise FolderSilent(f"{folder} did not answer for {timeout_s:g} s (engine.step_timeout_s)")
            return done.result()
        finally:
            done.cancel()

    async def is_gone(self) -> bool:
        """Whether the run's folder was removed; False if the file system does not answer."""
        try:
            return not await self.on_disk(os.path.isdir, self.folder.path)
        except FolderSilent:
            return False

    async def close(self) -> None:
        """Release the manifest's lock, at the latest when the folder answers again."""
        closing = self._disk.submit(self.file.close)
        self._disk.shutdown(wait=False)
        with best_effort(f"close the manifest of run {self.spec.run_id}"):
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(closing)), CLOSE_S)

    async def append(self, line: Line) -> None:
        """Commit a line, then notify clients. Raises FolderSilent, and as `ManifestFile.append`."""
        await self.on_disk(self.file.append, line)
        if not isinstance(line, Committed | Dropped):
            self.follow()
        await self.notify()

    def follow(self) -> None:
        """Work on as the manifest says."""
        self.spec = RunSpec.of(self.spec.root, self.spec.config, self.manifest)

    async def record_end(self, ended: Ended) -> Exception | None:
        """Complete the stream's files, remove the drafts of killed actors, and commit the end.

        Each step is tried several times and then skipped: clients must learn of an end even if the folder refuses
        writes or does not answer. Returns what kept the end from being committed.
        """
        steps: tuple[Callable[[], object], ...] = (
            self.stream.end,
            self.folder.remove_drafts,
            partial(self.file.append, ended),
        )
        failure: Exception | None = None
        for step in steps:
            for _ in range(END_ATTEMPTS):
                try:
                    await self.on_disk(step)
                    failure = None
                    break
                except FolderSilent as silent:
                    self.unrecorded = ended
                    return silent
                except Exception as error:
                    failure = error
        self.unrecorded = ended if failure else None
        return failure
