"""Fixtures of the unit tests, and coroutine tests, each in an event loop of its own."""

import asyncio
import inspect

import pytest

from edit_ray import EditWanPipeline
from edit_ray.cache import remove_cache_from_transformer
from edit_ray.testing import save_random_wan
from tests.unit.cached import quiet


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The path of a Wan of five blocks with random weights."""
    return save_random_wan(tmp_path_factory.mktemp("wan"), num_layers=5)


@pytest.fixture(scope="session")
def loaded(folder):
    return quiet(EditWanPipeline.from_pretrained(folder))


@pytest.fixture
def pipe(loaded):
    """A pipeline of that model, which has no cache after the test, and the parts that it had before."""
    transformer, scheduler = loaded.transformer, loaded.scheduler
    yield loaded
    loaded.disable_cache()
    remove_cache_from_transformer(transformer)
    loaded.transformer, loaded.scheduler = transformer, scheduler


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The path of a tiny Wan of random weights that conditions on context latents."""
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", expand_timesteps=True)


@pytest.fixture(scope="session")
def model_without_weights(tmp_path_factory):
    """What a configuration is checked against: the JSON files of a tiny Wan. No test changes them."""
    folder = save_random_wan(tmp_path_factory.mktemp("json") / "wan", expand_timesteps=True)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def start():
    """Starts the segment scheduler's class on a pool, by default a new one; the pools end with the test."""
    from edit_ray.actors.local import LocalPool
    from edit_ray.actors.segment_scheduler import SegmentSchedulerActor

    pools = []

    def start(pool=None):
        pools.append(pool or LocalPool())
        return SegmentSchedulerActor(pools[-1])

    yield start
    for pool in set(pools):
        asyncio.run(pool.end())


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Gives the folder of the run of a configuration to which nothing has happened."""
    from tests.runs_here import Whole

    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def finish(start, tmp_path):
    """Makes a run of the segment scheduler's class from its submission to its end; returns its status."""
    from tests.runs_here import end_of, submit

    async def finish(config, run_id="one", pool=None, root=tmp_path):
        scheduler = start(pool)
        await submit(scheduler, root, run_id, config)
        return await end_of(scheduler, run_id)

    return finish


@pytest.fixture
def clock():
    """A clock that shows the `now` to which a test sets it."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()
