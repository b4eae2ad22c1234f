"""A cluster that holds fewer GPU actors than a run asks for: the others wait, and whoever asked is told."""

import asyncio

import pytest

from edit_ray.actors import stages, work_loop
from edit_ray.actors.local import LocalPool
from edit_ray.actors.pool import ActorGone
from edit_ray.errors import NoPlace
from edit_ray.runs.folder import RunFolder
from tests.runs_here import check_same, config_for, done, end_of, submit

SHORT = {
    "video": {"num_segments": 2},
    "sampling": {"num_inference_steps": 1},
    "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
}
MANY = {"engine": {"cpu_threads": 1, "gpu_actors": 4, "segment_retries": 0}}
FOREVER = SHORT | {"video": {"num_segments": None}, "engine": MANY["engine"] | {"max_ahead": 1}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(work_loop, "COUNT_PLACES_S", 0.1)
    monkeypatch.setattr(stages, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(stages, "LONGEST_RETRY_PAUSE_S", 0.02)


class Small(LocalPool):
    """A cluster with places for so many GPU actors, which it can tell, or finds out when one is to be started."""

    def __init__(self, holds, tells=False):
        super().__init__()
        self.holds, self.tells = holds, tells

    async def places(self, spec):
        return self.holds if self.tells else None

    async def start(self, spec, worker):
        if worker >= self.holds:
            raise NoPlace("the GPU actor found no place in this Ray cluster")
        await super().start(spec, worker)


async def until(scheduler, run_id, there):
    async with asyncio.timeout(30):
        while not there(status := await scheduler.status(run_id)):
            await asyncio.sleep(0.01)
    return status


@pytest.mark.parametrize("tells", [True, False])
async def test_runs_beyond_what_the_cluster_holds_wait_and_say_why(start, tmp_path, model, tells):
    scheduler = start(Small(1, tells))
    for name in ("one", "two"):
        await submit(scheduler, tmp_path, name, config_for(model, **SHORT, **MANY), name)
    waits = await until(scheduler, "two", lambda status: status.state == "queued" and status.warning)
    for name in ("one", "two"):
        await done(scheduler, name)
    sentence = (
        "engine.gpu_actors asks for 4 GPU actors, and the nodes of this Ray cluster have places for 1; further runs "
        "wait until one of those is free"
    )
    assert waits.warning == (sentence if tells else "the GPU actor found no place in this Ray cluster")


async def test_a_run_goes_on_as_soon_as_a_node_comes(start, tmp_path, model):
    scheduler = start(pool := Small(1, tells=True))
    await submit(scheduler, tmp_path, "endless", config_for(model, **FOREVER), "endless")
    await submit(scheduler, tmp_path, "two", config_for(model, **SHORT, **MANY), "two")
    assert (await scheduler.status("two")).state == "queued"
    pool.holds = 2
    await done(scheduler, "two")
    await scheduler.cancel("endless")
    await end_of(scheduler, "endless")


async def test_a_run_whose_gpu_actor_has_lost_its_place_is_resumed_on_another(start, tmp_path, model):
    scheduler = start(pool := Small(2))
    await submit(scheduler, tmp_path, "endless", config_for(model, **FOREVER), "endless")
    await submit(scheduler, tmp_path, "two", config_for(model, **SHORT, **MANY), "two")
    await until(scheduler, "two", lambda status: status.state == "running")
    for name in ("two", "endless"):
        await scheduler.cancel(name)
        await end_of(scheduler, name)
    pool.holds = 1
    await scheduler.resume("two", str(tmp_path), False)
    assert (await done(scheduler, "two")).committed == 2


async def test_a_node_that_is_lost_at_work_hands_its_run_over_to_another(start, tmp_path, model, whole):
    """The second GPU actor dies while segment 1 is denoised, and finds no place any more."""

    class Shrinking(Small):
        async def denoiser(self, worker, method, *arguments):
            if worker == 1 and self.holds == 2 and method == "denoise_segment" and arguments[1].index == 1:
                self.holds = 1
            if worker >= self.holds:
                raise ActorGone("the node is lost")
            return await super().denoiser(worker, method, *arguments)

    scheduler = start(Shrinking(2))
    await submit(scheduler, tmp_path, "endless", config_for(model, **FOREVER), "endless")
    await submit(scheduler, tmp_path, "two", config_for(model, **SHORT, **MANY), "two")
    waits = await until(scheduler, "two", lambda status: status.state == "queued" and status.warning)
    assert waits.warning == "the GPU actor found no place in this Ray cluster"
    await scheduler.cancel("endless")
    await done(scheduler, "two")
    check_same(RunFolder(tmp_path, "two"), await whole(config_for(model, **SHORT, **MANY)))
