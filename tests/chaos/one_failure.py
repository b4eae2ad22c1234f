"""One operation on files fails, once: the run ends well all the same, or says why and goes on when it is asked to."""

import asyncio
import contextlib
import errno
import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from edit_ray import files
from edit_ray.actors import stages
from edit_ray.actors.local import LocalPool
from edit_ray.actors.pool import Pointer
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import EditRayError, RunEnded, RunExists
from edit_ray.runs.folder import RunFolder
from edit_ray.tiers.disk_tier import LOCK
from edit_ray.video.hls import newest_playlist
from tests.chaos.memory import remembered
from tests.chaos.power_loss import build
from tests.chaos.storm import die

RUN, OTHER, BRANCH = "one", "other", "one-branch"
SEGMENTS = 3
ERRORS = (errno.EIO, errno.ENOSPC, errno.EBUSY, errno.ESTALE, errno.EACCES)
SHORT = -1  # in the place of an error: a write takes only half; counts writes alone
KINDS = ("open", "read", "write", "truncate", "fsync", "lock", "replace", "link", "unlink", "mkdir", "rmdir", "listdir")


class OneFailure(files.Disk):
    """Lets operation number `at` on anything under `root` but the other run fail; says which that was."""

    def __init__(self, root: Path, at: int | None, number: int) -> None:
        self.root, self.at, self.number = root, at, number
        self.count, self.failed, self.seen, self._paths = 0, None, Counter(), {}
        self._lock = threading.Lock()

    def _fails(self, kind, path) -> bool:
        if path is None or (path != self.root and self.root not in path.parents):
            return False
        if f"{path.relative_to(self.root)}/".startswith((f"{OTHER}/", f".{OTHER}-")):
            return False
        if self.number == SHORT and kind != "write":
            return False
        with self._lock:
            self.count, number = self.count + 1, self.count
        self.seen[kind] += 1
        if number != self.at:
            return False
        self.failed = f"{kind} {path.relative_to(self.root)}"
        return True

    def _check(self, kind, path):
        if self._fails(kind, path):
            raise OSError(self.number, os.strerror(self.number), str(path))

    def open(self, path, flags):
        self._check("open", path)
        descriptor = super().open(path, flags)
        self._paths[descriptor] = path
        return descriptor

    def close(self, descriptor):
        self._paths.pop(descriptor, None)
        super().close(descriptor)

    def write(self, descriptor, parts, offset):
        if self._fails("write", self._paths.get(descriptor)):
            if self.number != SHORT:
                raise OSError(self.number, os.strerror(self.number))
            whole = b"".join(parts)
            return super().write(descriptor, [whole[: max(1, len(whole) // 2)]], offset)
        return super().write(descriptor, parts, offset)

    def fsync(self, descriptor):
        self._check("fsync", self._paths.get(descriptor))


def _of_descriptor(kind):
    def call(self, descriptor, *arguments):
        self._check(kind, self._paths.get(descriptor))
        return getattr(files.Disk, kind)(self, descriptor, *arguments)

    return call


def _of_path(kind):
    def call(self, path, *arguments):
        self._check(kind, path)
        return getattr(files.Disk, kind)(self, path, *arguments)

    return call


for _kind in ("read", "truncate", "lock"):
    setattr(OneFailure, _kind, _of_descriptor(_kind))
for _kind in ("replace", "link", "unlink", "mkdir", "rmdir", "listdir"):
    setattr(OneFailure, _kind, _of_path(_kind))


@dataclass
class Life:
    """What came of one phase: files by path, sentences of refusals and ends, and which operations there were."""

    made: dict[str, bytes] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


class Phase:
    """A part of a run's life, from what the one before has left; another run is served meanwhile."""

    def __init__(self, crew, root: Path, config, other) -> None:
        self.crew, self.root, self.config, self.other = crew, root, config, other
        self.life = Life()

    async def run(self):
        """Three segments, from the beginning."""
        scheduler = await self._begin()
        await self._ask(scheduler.submit, RUN, self.config.model_dump(mode="json"), *self._where, *self._where, "mine")
        await self._finish(scheduler)

    async def killed(self):
        """Not an experiment: leaves a run whose scheduler died after the first segment."""
        scheduler = await self._begin()
        await scheduler.submit(RUN, self.config.model_dump(mode="json"), *self._where, *self._where, "mine")
        await scheduler.wait_segment(RUN, 0, 60)
        await die(scheduler)

    async def recovery(self):
        """The next scheduler goes on by itself; where it refuses the run it is asked to."""
        await self.crew.remember({RUN: Pointer(str(self.root), 0)})
        scheduler = await self._begin()
        await self._ask(scheduler.resume, RUN, *self._where, False)
        await self._finish(scheduler)

    async def extend(self):
        scheduler = await self._begin()
        await self._ask(scheduler.extend, RUN, *self._where, 1, False)
        await self._finish(scheduler)

    async def reroll(self):
        scheduler = await self._begin()
        await self._ask(scheduler.reroll, RUN, *self._where, SEGMENTS - 1, 77, None, False)
        await self._finish(scheduler)

    async def steer(self):
        """As `run`, with an edit from the last segment on, between a pause and its end."""
        scheduler = await self._begin()
        await self._ask(scheduler.submit, RUN, self.config.model_dump(mode="json"), *self._where, *self._where, "mine")
        await self._ask(scheduler.pause, RUN, True)
        await self._ask(scheduler.steer, RUN, SEGMENTS - 1, {"seed": 77}, "mine")
        await self._ask(scheduler.pause, RUN, False)
        await self._finish(scheduler)

    async def branch(self):
        scheduler = await self._begin()
        await self._ask(scheduler.branch, BRANCH, *self._where, RUN, 2, {"seed": 77}, SEGMENTS, False, "mine")
        await self._finish(scheduler, BRANCH)

    @property
    def _where(self):
        return (str(self.root),)

    async def _begin(self):
        scheduler = SegmentSchedulerActor(self.crew)
        await self._ask(
            scheduler.submit, OTHER, self.other.model_dump(mode="json"), *self._where, *self._where, "other"
        )
        return scheduler

    async def _ask(self, call, *arguments):
        """What a user does: reads the sentence, and asks again."""
        for _ in range(2):
            try:
                return await call(*arguments)
            except EditRayError as error:
                self.life.refused.append(f"{call.__name__}: {error}")
                if isinstance(error, RunExists):  # it was made, only the answer was lost
                    return None
                if isinstance(error, RunEnded):
                    await call.__self__.resume(RUN, *self._where, False)
        raise AssertionError(f"refused twice: {self.life.refused}")

    async def _finish(self, scheduler, run_id=RUN):
        status = await self._end_of(scheduler, run_id)
        if status.state != "done":
            assert status.error, "it does not say why"
            self.life.ended.append(status.error)
            await scheduler.resume(run_id, *self._where, False)
            status = await self._end_of(scheduler, run_id)
        assert status.state == "done", status.error
        assert (await self._end_of(scheduler, OTHER)).state == "done", "another run was harmed"
        await self.crew.remember({})

    async def _end_of(self, scheduler, run_id):
        async with asyncio.timeout(60):
            while not (status := (await scheduler.wait_segment(run_id, 10**6, 5)).status).ended:
                pass
        return status

    def look(self):
        """Everything that the runs have made, and that nothing else is there."""
        for run in (RUN, OTHER, BRANCH):
            folder = RunFolder(self.root, run)
            if run == BRANCH and not folder.path.exists():
                continue
            assert folder.read_manifest().state == "done"
            playlist = folder.path / newest_playlist(folder.path)
            whole = [folder.path / name for name in ("init.mp4", "final.mp4", "stream.mp4")]
            kept = [path for name in ("latents", "segments") for path in (folder.path / name).iterdir()]
            self.life.made |= {str(path.relative_to(self.root)): path.read_bytes() for path in (*whole, *kept)}
            self.life.made[f"{run} plays"] = playlist.read_bytes()
        stored = [path for path in (self.root / ".cache_store").rglob("*") if path.is_file()]
        left = [*self.root.rglob(".*.part"), *self.root.glob(".one-*")]
        left += [path for path in stored if path.name != LOCK]  # of the stores that are open
        assert left == [], f"{left} was left"


PHASES = {"run": None, "recovery": "killed", "extend": "run", "reroll": "extend", "steer": None, "branch": "run"}
"""Each with the one whose files it begins with."""


@contextlib.contextmanager
def quick():
    """Nobody waits before another attempt, and what was made of the same once is not made again."""
    with remembered(), mock.patch.object(stages, "RETRY_PAUSE_S", 0.001):
        yield


class Experiment:
    """Phases with one failure each, compared with the same without; the models stay loaded."""

    def __init__(self, root: Path, config, other) -> None:
        self.root, self.config, self.other = root, config, other
        self.crew = LocalPool()
        self.begins: dict[str | None, dict[str, bytes | None]] = {None: {}}
        self.whole: dict[str, Life] = {}
        self.operations: dict[str, Counter] = {}
        self.refused, self.ended, self.failed = Counter(), Counter(), Counter()

    def prepare(self) -> None:
        """Lives through every phase undisturbed, twice, as the first time more is made than later."""
        for name in ("killed", *PHASES):
            for _ in range(2):
                disk = OneFailure(self.root, None, errno.EIO)
                life = self._live(name, disk)
            self.whole[name], self.operations[name] = life, disk.seen
            self.begins[name] = _files(self.root)
            assert life.refused == life.ended == [], f"{name}: refused {life.refused}, ended {life.ended}"

    def every(self) -> list[tuple[str, int, int]]:
        """All failures there are: the phase, the operation and the error."""
        return [
            (name, at, number)
            for name in PHASES
            for number in (*ERRORS, SHORT)
            for at in range(self.operations[name]["write"] if number == SHORT else self.operations[name].total())
        ]

    def fail(self, name: str, at: int, number: int) -> None:
        """One operation of a phase fails: what it makes is the same. Raises AssertionError, and what nobody caught."""
        disk = OneFailure(self.root, at, number)
        try:
            life = self._live(name, disk)
            assert life.made.keys() == self.whole[name].made.keys()
            for path, content in life.made.items():
                assert content == self.whole[name].made[path], f"{path} differs"
        except BaseException as error:
            error.add_note(f"{name}, operation {at}, {errno.errorcode.get(number, 'short')}: {disk.failed}")
            raise
        self.failed[disk.failed is not None] += 1
        self.refused.update(life.refused)
        self.ended.update(life.ended)

    def restart(self) -> None:
        """Nothing of what is in flight may disturb the next phase, which begins with other files."""
        for threads in [threads for worker in self.crew.workers.values() for threads in worker.threads.values()]:
            threads.shutdown()
        self.end()
        self.crew = LocalPool()

    def end(self) -> None:
        asyncio.run(self.crew.end())

    def _live(self, name, disk):
        build(self.root, self.begins[PHASES.get(name)])
        phase = Phase(self.crew, self.root, self.config, self.other)
        with quick(), files.swapped(disk):
            asyncio.run(getattr(phase, name)())  # which ends the scheduler's threads
        if name == "killed":  # its actors die as well, as they would go on with what the next phase begins with
            self.restart()
        else:
            phase.look()
        return phase.life


def _files(root):
    """Everything under a folder but the other run, as `build` takes it."""
    found = {}
    for path in sorted(root.rglob("*")):
        if OTHER not in path.relative_to(root).parts:
            found[path.relative_to(root).as_posix()] = path.read_bytes() if path.is_file() else None
    return found
