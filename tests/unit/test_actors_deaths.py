"""Actors that die are no failure of the segment that they worked on, unless it kills them each time."""

import asyncio

import pytest

from edit_ray.actors import stages
from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.local import LocalPool
from edit_ray.actors.pool import ActorGone
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.run_state import MOST_DEATHS
from tests.unit.test_actors import config_for
from tests.unit.test_actors_clocks import everything
from tests.unit.test_actors_recovery import REUSE, end_of, make, submit

SHORT = REUSE | {"video": {"num_segments": 3}}
NO_RETRIES = {"engine": {"cpu_threads": 1, "segment_retries": 0}}


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    asyncio.run(make(root, model, one=SHORT))
    return everything(root, "one")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stages, "LONGEST_RETRY_PAUSE_S", 0.02)


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


async def run(pool, root, model, **changes):
    scheduler = SegmentSchedulerActor(pool)
    await submit(scheduler, root, "one", config_for(model, **SHORT | NO_RETRIES | changes))
    status = await end_of(scheduler, "one")
    await pool.end()
    return status


WORK = ("prepare_run", "denoise_segment", "decode_segment", "encode_segment", "finalize_run")


@pytest.mark.parametrize(("who", "times"), [("GPU actor", 4), ("store", 4)])
async def test_deaths_of_actors_end_no_run_although_nothing_may_be_tried_again(
    tmp_path, model, undisturbed, who, times
):
    pool = Mortal(who, times, WORK if who == "GPU actor" else ["denoise_segment"])
    status = await run(pool, tmp_path, model)
    assert status.state == "done", status.error
    assert set(pool.left.values()) == {0}
    made, whole = everything(tmp_path, "one"), dict(undisturbed)
    assert made.pop("run.yaml") != whole.pop("run.yaml"), "which says how often work is tried again"
    assert {name: made[name] == whole[name] for name in whole} == dict.fromkeys(made, True)


async def test_work_that_kills_its_actor_each_time_ends_the_run_and_says_how_often(tmp_path, model):
    status = await run(Mortal("GPU actor", 10**6, ["denoise_segment"]), tmp_path, model)
    assert status.state == "failed"
    assert status.error == (
        f"denoise of segment 0 failed: actors died {MOST_DEATHS + 1} times during this work, which may be why "
        "(is memory short?): ActorGone: the actor 'denoiser' is gone"
    )


async def test_what_a_client_leaves_that_dies_while_it_submits_goes_with_the_run_s_end(tmp_path, model):
    left, of_another = RunFolder(tmp_path, "one").probe("a"), RunFolder(tmp_path, "one-b").probe("b")
    left.touch()
    of_another.touch()
    assert (await run(LocalPool(), tmp_path, model)).state == "done"
    assert (left.exists(), of_another.exists()) == (False, True)
