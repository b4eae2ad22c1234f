"""Actors that hang: what waits for one ends or goes on within a bound, and an end is always recorded."""

import asyncio
import time

import imageio_ffmpeg
import pytest
import torch

from edit_ray.actors import stages
from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.engine.latent_files import load_latents
from edit_ray.runs.folder import RunFolder
from tests.unit.test_actors import config_for

TIMES = {"cpu_threads": 1, "idle_exit_s": 3600, "step_timeout_s": 4.0, "load_timeout_s": 60.0, "answer_timeout_s": 2.0}
WARM = {"policy": "warmstart_reuse", "inner": "fbcache", "rel_l1_thresh": 0.2, "warm_steps": 2, "reuse_window": 2}
REUSE = {"cache": WARM, "store": {"host_bytes": 4 * 4096, "allow_tmpfs": True}}


class Stopped(LocalPool):
    """From a call of `when` on the actor named answers nothing, as after SIGSTOP, until it is killed. Then it is there
    again, or with `for_good` as soon as it is called like that another time stops again.
    """

    def __init__(self, role, when, for_good=False):
        super().__init__()
        self.role, self.when, self.for_good = role, when, for_good
        self.killed, self.restarts = None, []

    async def denoiser(self, worker, method, *arguments):
        return await self.answer("denoiser", method, super().denoiser(worker, method, *arguments))

    async def store(self, worker, method, *arguments):
        return await self.answer("store", method, super().store(worker, method, *arguments))

    async def answer(self, role, method, answer):
        if role == self.role and method == self.when and (self.for_good or not self.restarts) and self.killed is None:
            self.killed = asyncio.Event()
        if role == self.role and self.killed is not None:
            answer.close()
            await self.killed.wait()
            raise ConnectionError("the actor was killed")
        return await answer

    async def restart_denoiser(self, worker):
        self.free("denoiser")
        await super().restart_denoiser(worker)

    async def restart_store(self, worker):
        self.free("store")
        await super().restart_store(worker)

    def free(self, role):
        self.restarts.append(role)
        if role == self.role and self.killed is not None:
            self.killed.set()
            self.killed = None


async def submit(scheduler, root, config, run_id="hurt"):
    await scheduler.submit(run_id, config.model_dump(mode="json"), str(root), str(root), "mine")


async def end_of(scheduler, run_id="hurt", timeout_s=60):
    async with asyncio.timeout(timeout_s):
        while not (status := (await scheduler.wait_segment(run_id, 1000, 5)).status).ended:
            pass
    return status


def finish(root, config, pool, run_id="hurt"):
    async def run():
        scheduler = SegmentSchedulerActor(pool)
        await submit(scheduler, root, config, run_id)
        return await end_of(scheduler, run_id)

    return asyncio.run(run())


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("role", "when"),
    [
        ("denoiser", "prepare_run"),
        ("denoiser", "denoise_segment"),
        pytest.param("denoiser", "encode_segment", marks=pytest.mark.slow),
        ("denoiser", "finalize_run"),
        pytest.param("denoiser", "release_run", marks=pytest.mark.slow),
        ("store", "drop_run"),
        pytest.param("store", "describe", marks=pytest.mark.slow),
    ],
)
def test_whatever_hangs_is_restarted_and_the_run_is_done_with_the_same_frames(tmp_path, model, role, when):
    config = config_for(model, video={"num_segments": 3}, engine=TIMES, **REUSE)
    assert finish(tmp_path, config, LocalPool(), "whole").state == "done"
    pool = Stopped(role, when)
    status = finish(tmp_path, config, pool)
    assert status.state == "done", status.error
    assert RunFolder(tmp_path, "hurt").read_manifest().state == "done"
    if when not in ("release_run", "describe"):  # with the run's end nobody needs it any more; it may be through before
        assert pool.restarts == [role], "the one that hung, and no other"
    whole, hurt = (RunFolder(tmp_path, run_id) for run_id in ("whole", "hurt"))
    for index in range(3):
        assert torch.equal(load_latents(whole.latents(index)), load_latents(hurt.latents(index)))


def test_what_hangs_again_and_again_ends_the_run_with_a_sentence(tmp_path, model):
    config = config_for(model, engine=TIMES | {"segment_retries": 1})
    status = finish(tmp_path, config, Stopped("denoiser", "finalize_run", for_good=True))
    assert status.state == "failed"
    assert (
        "finalize failed (attempt 2 of 2): the GPU actor made no step for 4 s (engine.step_timeout_s)" in status.error
    )
    assert RunFolder(tmp_path, "hurt").read_manifest().error == status.error


@pytest.mark.one_in(3)
@pytest.mark.parametrize("when", ["prepare_run", "denoise_segment", "finalize_run"])
async def test_a_cancel_that_is_not_obeyed_ends_with_the_actor(start, tmp_path, model, when):
    pool = Stopped("denoiser", when)
    config = config_for(model, engine=TIMES | {"step_timeout_s": 3600.0, "load_timeout_s": 3600.0})

    scheduler = start(pool)
    await submit(scheduler, tmp_path, config)
    async with asyncio.timeout(60):
        while pool.killed is None:
            await asyncio.sleep(0.05)
    began = time.monotonic()
    await scheduler.cancel("hurt")
    status = await end_of(scheduler)
    seconds = time.monotonic() - began
    assert status.state == "cancelled"
    assert pool.restarts == ["denoiser"]
    assert seconds < 10, "answer_timeout_s, and what the end takes"


def test_a_long_join_that_goes_on_is_not_taken_for_one_that_hangs(tmp_path, model, monkeypatch):
    """The last video of a long run is copied for longer than a step may take."""
    slow = tmp_path / "ffmpeg"
    wait = 'case "$*" in *faststart*) while [ $SECONDS -lt 4 ]; do :; done;; esac'
    slow.write_text(f'#!/bin/bash\n{wait}\nexec "{imageio_ffmpeg.get_ffmpeg_exe()}" "$@"\n')
    slow.chmod(0o700)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(slow))
    pool = Stopped("nobody", "never")
    config = config_for(model, video={"num_segments": 3}, engine=TIMES | {"step_timeout_s": 2.0, "segment_retries": 0})
    status = finish(tmp_path, config, pool)
    assert status.state == "done", status.error
    assert pool.restarts == []


def test_a_store_that_takes_long_to_be_there_again_is_told_of_the_end(tmp_path, model, monkeypatch):
    monkeypatch.setattr(stages, "RELEASE_PAUSE_S", 0.01)

    class Away(LocalPool):
        left = 50

        async def store(self, worker, method, *arguments):
            if method == "drop_run" and self.left:
                self.left -= 1
                raise ConnectionError("the store is being started again")
            return await super().store(worker, method, *arguments)

    assert finish(tmp_path, config_for(model, video={"num_segments": 3}, **REUSE), Away()).state == "done"
    assert not list((tmp_path / ".cache_store").glob("*.safetensors"))


class Delayed(LocalPool):
    """Its scheduler is stopped for longer than an actor may hang, in the midst of a step that takes a while."""

    restarts = 0

    async def denoiser(self, worker, method, *arguments):
        if method == "denoise_segment" and arguments[1].index == 0:
            await asyncio.sleep(0.6)
            time.sleep(3.0)
            await asyncio.sleep(0.6)
        return await super().denoiser(worker, method, *arguments)

    async def restart_denoiser(self, worker):
        self.restarts += 1
        await super().restart_denoiser(worker)


def test_a_scheduler_that_was_stopped_itself_takes_no_actor_for_hung(tmp_path, model):
    pool = Delayed()
    config = config_for(model, video={"num_segments": 3}, engine=TIMES | {"step_timeout_s": 2.0})
    assert finish(tmp_path, config, pool).state == "done"
    assert pool.restarts == 0
