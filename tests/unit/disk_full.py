"""A run on a file system that is really full, over and over, each time with a little more room than the last.

python -m tests.unit.disk_full MODEL ROOM WHOLE, where ROOM is an empty file system of its own, larger than the margin
that a run is asked to leave, and WHOLE the folder of an undisturbed run.
"""

import asyncio
import contextlib
import os
import shutil
import sys
from pathlib import Path

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.engine.continuity import load_latents
from edit_ray.runs.folder import RunFolder
from tests.runs_here import REUSE, check_same, config_for, done, end_of, submit

STEP = 4096


def leave(ballast: Path, count: int) -> None:
    """Fills the file system but for so many bytes; again where the run has written since they were counted."""
    for _ in range(1000):
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            status = os.statvfs(ballast)
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - count)
            return
    raise AssertionError("the file system could not be filled")


async def survive(root: Path, model: Path, count: int) -> str:
    """One run that finds so many bytes from its first commit on; how it ended, or `done` where they did."""
    crew, ballast = LocalPool(), root / "ballast"
    scheduler = SegmentSchedulerActor(crew)
    await submit(scheduler, root, "reuse", config_for(model, **REUSE))
    await scheduler.wait_segment("reuse", 0, 60)
    leave(ballast, count)
    ended = await end_of(scheduler, "reuse")
    ballast.unlink()
    if ended.state == "failed":
        assert "no space is left for" in ended.error, ended.error
        folder = RunFolder(root, "reuse")
        for record in folder.read_manifest().segments:
            load_latents(folder.path / record.latents)
            assert (folder.path / record.media).stat().st_size
        await scheduler.resume("reuse", str(root), False)
        await done(scheduler, "reuse")
    await crew.end()
    return ended.error or "done"


def main(model: Path, room: Path, whole: Path) -> None:
    count, said = 0, ""
    while said != "done":
        said = asyncio.run(survive(room, model, count))
        print(f"{count:7} bytes: {said[:60]}", flush=True)
        made = RunFolder(room, "reuse")
        check_same(RunFolder(whole.parent, whole.name), made)
        shutil.rmtree(made.path)
        assert list(room.glob(".cache_store/*.safetensors")) == []
        count += STEP
    assert count > STEP, "it was never full"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
