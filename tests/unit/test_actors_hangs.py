"""Actors that hang or die: what waits for one goes on or ends in time, and no segment fails by it alone."""

import asyncio
import time
from functools import partial

import imageio_ffmpeg
import pytest

from edit_ray.actors import stages
from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.local import LocalPool
from edit_ray.actors.pool import ActorGone
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.scheduler import MOST_DEATHS
from tests.runs_here import REUSE, SHORT, check_same, config_for, end_of, submit

TIMES = {"cpu_threads": 1, "idle_exit_s": 3600, "step_timeout_s": 4.0, "load_timeout_s": 60.0, "answer_timeout_s": 2.0}
SHORT_REUSE = REUSE | SHORT
NO_RETRIES = {"engine": {"cpu_threads": 1, "segment_retries": 0}}
WORK = ("prepare_run", "denoise_segment", "decode_segment", "encode_segment", "finalize_run")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stages, "LONGEST_RETRY_PAUSE_S", 0.02)


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


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("role", "when"),
    [
        ("denoiser", "denoise_segment"),
        ("denoiser", "prepare_run"),
        pytest.param("denoiser", "encode_segment", marks=pytest.mark.slow),
        ("denoiser", "finalize_run"),
        pytest.param("denoiser", "release_run", marks=pytest.mark.slow),
        ("store", "drop_run"),
        pytest.param("store", "describe", marks=pytest.mark.slow),
    ],
)
async def test_whatever_hangs_is_restarted_and_the_run_makes_the_same_bytes(finish, tmp_path, model, whole, role, when):
    pool = Stopped(role, when)
    status = await finish(config_for(model, engine=TIMES, **SHORT_REUSE), pool=pool)
    assert status.state == "done", status.error
    assert RunFolder(tmp_path, "one").read_manifest().state == "done"
    if when not in ("release_run", "describe"):  # with the run's end nobody needs it any more; it may be through before
        assert pool.restarts == [role], "the one that hung, and no other"
    check_same(RunFolder(tmp_path, "one"), await whole(config_for(model, **SHORT_REUSE)), but=["run.yaml"])


async def test_a_store_that_hangs_soon_after_its_restart_is_found_as_fast(start, tmp_path, model):
    pool = Stopped("store", "drop_run")
    scheduler, config = start(pool), config_for(model, engine=TIMES | {"start_timeout_s": 60.0}, **SHORT_REUSE)
    for run_id in ("one", "two"):
        await submit(scheduler, tmp_path, run_id, config)
        began = time.monotonic()
        assert (await end_of(scheduler, run_id)).state == "done"
        assert pool.restarts == ["store"]
        assert time.monotonic() - began < 30, "a run, and answer_timeout_s"
        pool.restarts.clear()


async def test_what_hangs_again_and_again_ends_the_run_with_a_sentence(finish, tmp_path, model):
    config = config_for(model, engine=TIMES | {"step_timeout_s": 2.0, "segment_retries": 1})
    status = await finish(config, pool=Stopped("denoiser", "finalize_run", for_good=True))
    assert status.state == "failed"
    assert (
        "finalize failed (attempt 2 of 2): the GPU actor made no step for 2 s (engine.step_timeout_s)" in status.error
    )
    assert RunFolder(tmp_path, "one").read_manifest().error == status.error


@pytest.mark.one_in(3)
@pytest.mark.parametrize("when", ["prepare_run", "denoise_segment", "finalize_run"])
async def test_a_cancel_that_is_not_obeyed_ends_with_the_actor(start, tmp_path, model, when):
    pool = Stopped("denoiser", when)
    config = config_for(model, engine=TIMES | {"step_timeout_s": 3600.0, "load_timeout_s": 3600.0})
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config)
    async with asyncio.timeout(60):
        while pool.killed is None:
            await asyncio.sleep(0.05)
    began = time.monotonic()
    await scheduler.cancel("one")
    assert (await end_of(scheduler, "one")).state == "cancelled"
    assert time.monotonic() - began < 10, "answer_timeout_s, and what the end takes"
    assert pool.restarts == ["denoiser"]


async def test_a_long_join_that_goes_on_is_not_taken_for_one_that_hangs(finish, tmp_path, model, monkeypatch):
    """The last video of a long run is copied for longer than a step may take."""
    slow = tmp_path / "ffmpeg"
    wait = 'case "$*" in *faststart*) while [ $SECONDS -lt 4 ]; do :; done;; esac'
    slow.write_text(f'#!/bin/bash\n{wait}\nexec "{imageio_ffmpeg.get_ffmpeg_exe()}" "$@"\n')
    slow.chmod(0o700)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(slow))
    pool = Stopped("nobody", "never")
    config = config_for(model, **SHORT, engine=TIMES | {"step_timeout_s": 2.0, "segment_retries": 0})
    status = await finish(config, pool=pool)
    assert status.state == "done", status.error
    assert pool.restarts == []


async def test_a_store_that_takes_long_to_be_there_again_is_told_of_the_end(finish, tmp_path, model, monkeypatch):
    monkeypatch.setattr(stages, "RELEASE_PAUSE_S", 0.01)

    class Away(LocalPool):
        left = 50

        async def store(self, worker, method, *arguments):
            if method == "drop_run" and self.left:
                self.left -= 1
                raise ConnectionError("the store is being started again")
            return await super().store(worker, method, *arguments)

    assert (await finish(config_for(model, **SHORT_REUSE), pool=Away())).state == "done"
    assert not list((tmp_path / ".cache_store").glob("*.safetensors"))


async def test_a_scheduler_that_was_stopped_itself_takes_no_actor_for_hung(finish, model):
    """It is stopped for longer than an actor may hang, during a step that takes a while."""

    class Delayed(Stopped):
        async def denoiser(self, worker, method, *arguments):
            if method == "denoise_segment" and arguments[1].index == 0:
                await asyncio.sleep(0.6)
                time.sleep(3.0)
                await asyncio.sleep(0.6)
            return await super().denoiser(worker, method, *arguments)

    pool = Delayed("nobody", "never")
    config = config_for(model, **SHORT, engine=TIMES | {"step_timeout_s": 2.0})
    assert (await finish(config, pool=pool)).state == "done"
    assert pool.restarts == []


class Mortal(LocalPool):
    """Its GPU actor, or its store, dies so many times during each of these calls."""

    def __init__(self, who, times, methods):
        super().__init__()
        self.who, self.left = who, dict.fromkeys(methods, times)

    async def denoiser(self, worker, method, *arguments):
        if not self.left.get(method):
            return await super().denoiser(worker, method, *arguments)
        self.left[method] -= 1
        of = self.workers[worker]
        if self.who == "store":
            at_work = asyncio.ensure_future(super().denoiser(worker, method, *arguments))
            await asyncio.sleep(0.02)
            of.store.close()
            of.store = CacheStoreActor(worker)
            return await at_work
        await self.restart_denoiser(worker)
        raise ActorGone("the actor 'denoiser' is gone")


# A store that dies when a segment needs it no longer costs no further call: there are three calls at least.
@pytest.mark.parametrize(
    ("who", "methods", "times"), [("GPU actor", WORK, 4), ("store", ["denoise_segment"], 3)], ids=["GPU actor", "store"]
)
async def test_deaths_of_actors_end_no_run_although_nothing_may_be_tried_again(
    finish, tmp_path, model, whole, who, methods, times
):
    pool = Mortal(who, times, methods)
    status = await finish(config_for(model, **SHORT_REUSE | NO_RETRIES), pool=pool)
    assert status.state == "done", status.error
    assert set(pool.left.values()) == {0}
    check_same(RunFolder(tmp_path, "one"), await whole(config_for(model, **SHORT_REUSE)), but=["run.yaml"])


class DiesAround(LocalPool):
    """Its store dies once as each of its methods is called, or directly after the answer."""

    def __init__(self, when):
        super().__init__()
        self.when, self.died = when, []

    async def start(self, spec, worker):
        new = worker not in self.workers
        await super().start(spec, worker)
        if new:
            of = self.workers[worker]
            of.call = partial(self.call, of, of.call)

    def call(self, of, ask, method, *arguments):
        if self.when == "before":
            self.die(of, method)
        reply = ask(method, *arguments)

        def answer():
            result = reply()
            if self.when == "after":
                self.die(of, method)
            return result

        return answer

    def die(self, of, method):
        if method not in self.died:
            self.died.append(method)
            of.store.close()
            of.store = CacheStoreActor()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_store_may_die_around_each_of_its_calls(finish, tmp_path, model, whole, when):
    pool = DiesAround(when)
    status = await finish(config_for(model, **SHORT_REUSE | NO_RETRIES), pool=pool)
    assert status.state == "done", status.error
    assert {"follow", "prepare", "complete"} <= set(pool.died)
    check_same(RunFolder(tmp_path, "one"), await whole(config_for(model, **SHORT_REUSE)), but=["run.yaml"])


async def test_work_that_kills_its_actor_each_time_ends_the_run_and_says_how_often(finish, model):
    pool = Mortal("GPU actor", 10**6, ["denoise_segment"])
    status = await finish(config_for(model, **SHORT_REUSE | NO_RETRIES), pool=pool)
    assert status.state == "failed"
    assert status.error == (
        f"denoise of segment 0 failed: actors died {MOST_DEATHS + 1} times during this work, which may be why "
        "(is memory short?): ActorGone: the actor 'denoiser' is gone"
    )


async def test_what_a_client_leaves_that_dies_while_it_submits_goes_with_the_run_s_end(finish, tmp_path, model):
    left, of_another = RunFolder(tmp_path, "one").probe("a"), RunFolder(tmp_path, "one-b").probe("b")
    left.touch()
    of_another.touch()
    assert (await finish(config_for(model, **SHORT_REUSE))).state == "done"
    assert (left.exists(), of_another.exists()) == (False, True)
