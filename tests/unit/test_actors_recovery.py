"""A segment scheduler that dies at any instant, and the next one: same frames, nothing twice, nothing left over."""

import asyncio
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest

from edit_ray.actors import stages
from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.actors.stages import LONGEST_RETRY_PAUSE_S, pause_before
from edit_ray.errors import HardwareDiffers, ResourcesUnavailable, UnknownRun
from edit_ray.runs.event_log import read_events
from edit_ray.runs.folder import RunFolder
from tests.chaos.storm import die
from tests.runs_here import PLAIN_AND_REUSE, REUSE, SEGMENTS, Dying, check_same, config_for, done, end_of, made, submit

REPOSITORY = Path(__file__).resolve().parents[2]


async def leave_half_made(root, run_id, config):
    """A run that was at work when all its actors died."""
    pool = Dying(5)
    scheduler = SegmentSchedulerActor(pool)
    await submit(scheduler, root, run_id, config)
    await pool.now.wait()
    await die(scheduler)
    await pool.end()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("calls", [1, 2, 4, 6, 9, 11])
@pytest.mark.parametrize("name", ["plain", "reuse"])
async def test_the_next_segment_scheduler_goes_on_to_the_same_bytes(start, tmp_path, model, whole, name, calls):
    pool, config = Dying(calls), config_for(model, **PLAIN_AND_REUSE[name])
    first = start(pool)
    await submit(first, tmp_path, name, config)
    await pool.now.wait()
    await die(first)
    second = start(pool)
    seen, index = [], 0
    while (reply := await second.wait_segment(name, index, 60)).record is not None:
        seen.append(reply.record.index)
        index += 1
    assert reply.status.state == "done", reply.status.error
    assert await pool.recall() == {}
    assert seen == list(range(SEGMENTS))
    hurt = RunFolder(tmp_path, name)
    check_same(await whole(config), hurt)
    assert hurt.read_manifest().incarnation == 2
    assert all("denoise_s" in record.statistics for record in hurt.read_manifest().segments)
    assert list((tmp_path / ".cache_store").glob("*.safetensors")) == []


class Slow(Dying):
    """From some time on it takes long to say of one run what its bits depend on."""

    slow_run, asked = None, None

    async def denoiser(self, worker, method, *arguments):
        if method == "provenance" and arguments[0].run_id == self.slow_run:
            self.asked.set()
            await asyncio.Event().wait()
        return await super().denoiser(worker, method, *arguments)


async def test_a_recovery_that_dies_half_way_forgets_no_run(start, tmp_path, model, whole):
    first = start(pool := Slow(4))
    for run_id in ("one", "two"):
        await submit(first, tmp_path, run_id, config_for(model))
    await pool.now.wait()
    await die(first)
    pool.slow_run, pool.asked = "two", asyncio.Event()
    second = start(pool)
    await pool.asked.wait()
    await asyncio.sleep(0)
    assert set(await pool.recall()) == {"one", "two"}
    second._recovered.cancel()
    await die(second)
    pool.slow_run = None
    third = start(pool)
    for run_id in ("one", "two"):
        await done(third, run_id)
        check_same(RunFolder(tmp_path, run_id), await whole(config_for(model)))


async def test_a_submission_that_is_asked_for_again_is_the_same_run(start, tmp_path, model):
    first = start(pool := LocalPool())
    await submit(first, tmp_path, "one", config_for(model))
    await submit(first, tmp_path, "one", config_for(model))
    await die(first)
    second = start(pool)
    await submit(second, tmp_path, "one", config_for(model))
    await done(second, "one")
    await die(second)
    third = start(pool)
    status = await submit(third, tmp_path, "one", config_for(model))
    assert status.committed == SEGMENTS
    await end_of(third, "one")


async def test_a_run_goes_on_from_its_folder_alone(start, tmp_path, model, whole):
    """As after the loss of the whole cluster: other actors, and nobody who remembers."""
    await leave_half_made(tmp_path, "plain", config_for(model))
    second = start()
    with pytest.raises(UnknownRun):
        await second.status("plain")
    assert (await second.resume("plain", str(tmp_path), False)).state in ("queued", "preparing")
    assert (await second.resume("plain", str(tmp_path), False)).run_id == "plain", "what lives is left as it is"
    await done(second, "plain")
    assert (await second.resume("plain", str(tmp_path), False)).state == "done"
    with pytest.raises(UnknownRun, match="no run 'nobody'"):
        await second.resume("nobody", str(tmp_path), False)
    check_same(RunFolder(tmp_path, "plain"), await whole(config_for(model)))


async def test_a_run_goes_on_beside_the_residuals_that_it_has_left(start, tmp_path, model, whole):
    """It was on the second GPU actor, and comes to the second one again, though the first is free."""
    first = start(pool := LocalPool())
    engine = {"engine": {"cpu_threads": 1, "gpu_actors": 2}}
    for run_id, changes in (("other", {}), ("reuse", REUSE)):
        await submit(first, tmp_path, run_id, config_for(model, **changes, **engine))
    await first.wait_segment("reuse", 0, 60)
    await die(first)
    await pool.end()
    second = start()
    await second.resume("reuse", str(tmp_path), False)
    await done(second, "reuse")
    assert (second._runs["reuse"].worker) == 1
    folder = RunFolder(tmp_path, "reuse")
    check_same(await whole(config_for(model, **REUSE)), folder, but=["run.yaml"])
    assert [record.statistics["segments_made_again"] for record in folder.read_manifest().segments] == [0] * SEGMENTS


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["plain", "reuse"])
async def test_a_stopped_run_goes_on_to_the_same_bytes(start, tmp_path, model, whole, name):
    folder, config = RunFolder(tmp_path, name), config_for(model, **PLAIN_AND_REUSE[name])
    scheduler = start()
    await submit(scheduler, tmp_path, name, config)
    await scheduler.wait_segment(name, 1, 60)
    await scheduler.cancel(name)
    assert (await end_of(scheduler, name)).state == "cancelled"
    before = read_events(folder.events)
    await scheduler.resume(name, str(tmp_path), False)
    await done(scheduler, name)
    after = read_events(folder.events)
    made = {event["segment"] for event in before if event["event"] == "segment_made"}
    begun = {event["segment"] for event in after[len(before) :] if event["event"] == "segment_begun"}
    assert begun == set(range(SEGMENTS)) - made, "what was denoised is not denoised again"
    assert all("denoise_s" in record.statistics for record in folder.read_manifest().segments)
    assert (await whole(config)).final.read_bytes() == folder.final.read_bytes()
    assert list((tmp_path / ".cache_store").glob("*.safetensors")) == []


class OtherHardware(LocalPool):
    async def denoiser(self, worker, method, *arguments):
        said = await super().denoiser(worker, method, *arguments)
        return said | {"threads": 64, "device": "an abacus"} if method == "provenance" else said


async def test_other_hardware_is_refused_by_name(start, tmp_path, model):
    await leave_half_made(tmp_path, "one", config_for(model))
    second = start(OtherHardware())
    with pytest.raises(HardwareDiffers, match=r"device was 'cpu \w+' and is 'an abacus', threads was 1 and is 64"):
        await second.resume("one", str(tmp_path), False)
    assert RunFolder(tmp_path, "one").read_manifest().incarnation == 1, "nothing was written"
    await second.resume("one", str(tmp_path), True)
    await done(second, "one")
    assert RunFolder(tmp_path, "one").read_manifest().provenance["device"] == "an abacus"


SYNCED = (
    "latents",
    "records",
    "segments",
    "init.mp4",
    "stream.mp4",
    "live-0.m3u8",
    "live.m3u8",
    "manifest",
    "final.mp4",
)


class FullDisk:
    """`os.fsync` on a file system that is full: while `full` for everything, else the first time for each of `left`."""

    def __init__(self):
        self.full, self.left, self.sync = False, set(SYNCED), os.fsync

    def __call__(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = next((kind for kind in self.left if re.search(rf"/\.?{kind}[./]", path + "/")), None)
        if "/reuse/" in path and (self.full or kind):
            self.left.discard(kind)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.sync(descriptor)


async def test_a_full_disk_loses_nothing_that_is_committed(start, tmp_path, model, whole, monkeypatch):
    """First it is full until the run gives up, then, when it has been resumed, once for every kind of file."""
    folder, disk, undisturbed = RunFolder(tmp_path, "reuse"), FullDisk(), await whole(config_for(model, **REUSE))
    monkeypatch.setattr(os, "fsync", disk)
    scheduler = start()
    config = config_for(model, **REUSE, engine={"cpu_threads": 1, "segment_retries": 5})
    disk.left = set()
    await submit(scheduler, tmp_path, "reuse", config)
    await scheduler.wait_segment("reuse", 0, 60)
    disk.full = True
    failed = await end_of(scheduler, "reuse")
    there = folder.read_manifest()
    with pytest.raises(ResourcesUnavailable, match="no space is left in"):
        await scheduler.resume("reuse", str(tmp_path), False)
    disk.full = False
    await scheduler.resume("reuse", str(tmp_path), False)
    disk.left = set(SYNCED) - {"init.mp4", "live.m3u8"}  # these are there
    ended = await end_of(scheduler, "reuse")
    assert failed.state == "failed"
    assert f"no space is left for {folder.path}; free some, then run `edit-ray resume reuse`" in failed.error
    assert (there.state, len(there.segments) >= 1) == ("open", True), "its end could not be recorded"
    assert folder.read_manifest().segments[: len(there.segments)] == there.segments
    assert (ended.state, disk.left) == ("done", set()), ended.error
    check_same(undisturbed, folder, but=["run.yaml"])


@pytest.mark.slow
def test_a_file_system_that_is_really_full_loses_nothing(tmp_path, model, whole):
    """With a little more room each time, so that all kinds of files are in turn the one that does not fit."""
    room = tmp_path / "room"
    room.mkdir()
    # In a mount namespace of its own, in which who runs the tests may mount what nobody else sees.
    mounted = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount = 'mount -t tmpfs -o size=96m none "$0"'
    if shutil.which("unshare") is None or subprocess.run([*mounted, mount, room], check=False).returncode:
        pytest.skip("needs user namespaces, to mount a small file system without privileges")
    undisturbed = asyncio.run(whole(config_for(model, **REUSE))).path
    script = [sys.executable, "-m", "tests.unit.disk_full", model, room, undisturbed]
    command = [*mounted, f'{mount} && exec "$@"', room, *script]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]


# What the encoder is when it is killed: it has read some frames, and written a part of what it makes.
KILLED = """#!/bin/sh
case "$*" in *libx264*) kind=encode;; *ffmetadata*) kind=join;; *) kind=read;; esac
if mkdir "{flags}/$kind" 2>/dev/null; then
    for last; do :; done
    head -c 5000 | "{ffmpeg}" "$@" 2>/dev/null | head -c 700
    [ "$kind" = join ] && echo half >"$last"
    kill -9 $$
fi
exec "{ffmpeg}" "$@"
"""


async def test_an_encoder_that_is_killed_is_started_again(start, tmp_path, model, whole, monkeypatch):
    undisturbed, killed = await whole(config_for(model)), tmp_path / "killed"
    killed.mkdir()
    script = tmp_path / "ffmpeg"
    script.write_text(KILLED.format(flags=killed, ffmpeg=imageio_ffmpeg.get_ffmpeg_exe()))
    script.chmod(0o700)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    folder = await made(start(), tmp_path, "one", config_for(model, engine={"segment_retries": 0}))
    assert {path.name for path in killed.iterdir()} >= {"encode", "join"}
    check_same(undisturbed, folder, but=["run.yaml"])


def test_what_failed_is_tried_again_after_a_while_that_grows_and_is_bounded(monkeypatch):
    monkeypatch.setattr(stages, "RETRY_PAUSE_S", 1.0)
    pauses = [pause_before(attempt) for attempt in range(102)]
    assert pauses[:4] == [0.0, 1.0, 2.0, 4.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_RETRY_PAUSE_S
