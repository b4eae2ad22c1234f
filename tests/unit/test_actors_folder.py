"""A folder that stops answering, as on a file server that is away: its run waits or ends in time, others go on."""

import asyncio
import errno
import os
import threading
import time
from pathlib import Path

import pytest

from edit_ray import files
from edit_ray.errors import ResourcesUnavailable
from edit_ray.runs.folder import RunFolder
from tests.runs_here import SHORT, check_same, config_for, done, end_of, submit

STEP_S = 1.5


class Silent(files.Disk):
    """The first operation that is wanted, `wanted(kind, path, data)`, returns only when the folder answers again."""

    def __init__(self, wanted):
        self.wanted, self.asked, self.answers = wanted, threading.Event(), threading.Event()

    def wait(self, kind, path, data=b""):
        if self.wanted(kind, Path(path), data):
            self.asked.set()
            assert self.answers.wait(60), "the test is over"

    def write(self, descriptor, parts, offset):
        self.wait("write", os.readlink(f"/proc/self/fd/{descriptor}"), b"".join(parts))
        return super().write(descriptor, parts, offset)

    def replace(self, source, target):
        self.wait("replace", target)
        super().replace(source, target)

    def listdir(self, path):
        self.wait("listdir", path)
        return super().listdir(path)


def config_of(model, retries=20):
    engine = {"cpu_threads": 1, "idle_exit_s": 3600, "gpu_actors": 2, "segment_retries": retries}
    return config_for(model, **SHORT, engine=engine | {"step_timeout_s": STEP_S, "load_timeout_s": 60.0})


async def until(event):
    assert await asyncio.to_thread(event.wait, 60)


SILENT = {
    "the manifest": lambda kind, path, data: path.name == "manifest.jsonl" and b'"committed"' in data,
    "the event log": lambda kind, path, data: path.name == "events.jsonl" and b'"gpu_actor"' in data,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("what", SILENT)
async def test_a_run_whose_folder_answers_again_goes_on_and_others_have_not_waited(start, tmp_path, model, what):
    disk = Silent(lambda kind, path, data: path.parent == tmp_path / "stuck" and SILENT[what](kind, path, data))

    with files.swapped(disk):
        scheduler = start()
        await submit(scheduler, tmp_path, "stuck", config_of(model))
        await until(disk.asked)
        await submit(scheduler, tmp_path, "other", config_of(model))
        await done(scheduler, "other")
        assert not RunFolder(tmp_path, "stuck").final.exists()
        disk.answers.set()
        await done(scheduler, "stuck")
    check_same(RunFolder(tmp_path, "stuck"), RunFolder(tmp_path, "other"))


async def test_a_run_whose_folder_does_not_answer_ends_in_time_and_may_be_resumed(start, tmp_path, model, whole):
    disk = Silent(lambda kind, path, data: (kind, path) == ("replace", tmp_path / "stuck" / "live.m3u8"))

    with files.swapped(disk):
        scheduler = start()
        await submit(scheduler, tmp_path, "stuck", config_of(model, retries=0))
        await until(disk.asked)
        began = time.monotonic()
        failed = await end_of(scheduler, "stuck")
        seconds = time.monotonic() - began
        disk.answers.set()
        await scheduler.resume("stuck", str(tmp_path), False)
        await done(scheduler, "stuck")
    silent = f"the run's folder {tmp_path / 'stuck'} did not answer for 1.5 s"
    assert f"commit of segment 0 failed (attempt 1 of 1): {silent}" in failed.error
    assert seconds < 4 * STEP_S
    check_same(RunFolder(tmp_path, "stuck"), await whole(config_of(model, retries=0)))


async def test_a_folder_of_runs_that_is_busy_is_refused_with_a_sentence(start, tmp_path, model):
    class Busy(files.Disk):
        def listdir(self, path):
            if path == tmp_path:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
            return super().listdir(path)

    with files.swapped(Busy()):
        scheduler = start()
        with pytest.raises(ResourcesUnavailable, match=r"cannot be used \(Device or resource busy\); ask again"):
            await submit(scheduler, tmp_path, "one", config_for(model, **SHORT))


async def test_a_folder_of_runs_that_does_not_answer_is_refused_and_holds_up_nobody(start, tmp_path, model):
    silent, well = tmp_path / "silent", tmp_path / "well"
    silent.mkdir()
    well.mkdir()
    disk = Silent(lambda kind, path, data: path == silent)
    config = config_for(model, engine={"cpu_threads": 1, "idle_exit_s": 3600, "answer_timeout_s": 1.0}, **SHORT)

    with files.swapped(disk):
        scheduler = start()
        refused = asyncio.create_task(submit(scheduler, silent, "one", config))
        await until(disk.asked)
        await submit(scheduler, well, "two", config)
        with pytest.raises(ResourcesUnavailable, match="silent did not answer for 1 s"):
            await refused
        disk.answers.set()
        await done(scheduler, "two")
