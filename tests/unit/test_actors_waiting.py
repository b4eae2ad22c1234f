"""Runs that cannot go on after their segment scheduler has died: they wait, others do not, and none is forgotten."""

import asyncio
import errno
import fcntl
import json
import os
import threading
from contextlib import asynccontextmanager

import pytest

from edit_ray.actors import launch
from edit_ray.actors.launch import RayPool
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.cli.run_commands import line_of
from edit_ray.errors import ConfigError, NoPlace, ResourcesUnavailable, RunExists, RunLive
from edit_ray.runs.folder import RunFolder
from tests.chaos.storm import die
from tests.runs_here import SHORT, Dying, check_same, config_for, done, end_of, submit

TWO_ACTORS = {"engine": {"cpu_threads": 1, "gpu_actors": 2}}


class Troubled(Dying):
    """A pool that has its own trouble, so many times, when it is asked what a run's bits depend on."""

    trouble, times = None, 0

    async def denoiser(self, worker, method, *arguments):
        if method == "provenance" and self.times:
            self.times -= 1
            raise self.trouble
        return await super().denoiser(worker, method, *arguments)


@asynccontextmanager
async def died_at_work(root, model, *run_ids, calls=5, **changes):
    """A pool whose segment scheduler has died, with these runs half made; it may be troubled from then on."""
    pool = Troubled(calls)
    first = SegmentSchedulerActor(pool)
    for run_id in run_ids:
        await submit(first, root, run_id, config_for(model, **SHORT, **changes), run_id)
    await asyncio.wait_for(pool.now.wait(), 60)
    await die(first)
    try:
        yield pool
    finally:
        await pool.end()


DAMAGE = {
    "not a dict": b"7\n",
    "bytes": b"\xff\xfe\xff\n",
    "nested": b"[" * 100_000 + b"\n",
    "words for numbers": b'{"event": "gpu_actor", "wall": 1.0, "monotonic": 1.0, "worker": "x"}\n',
    "figures": b'{"event": "segment_made", "wall": 1, "monotonic": 1, "segment": 0, "figures": {"a": "b"}}\n',
}
DAMAGE["all of it"] = b"".join(DAMAGE.values())


@pytest.mark.parametrize(
    "damage",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in DAMAGE if name != "all of it"), "all of it", "a folder"],
)
async def test_no_damage_to_the_event_log_costs_anything(start, tmp_path, model, whole, damage):
    async with died_at_work(tmp_path, model, "plain") as pool:
        log = RunFolder(tmp_path, "plain").events
        if damage == "a folder":
            log.unlink()
            log.mkdir()
        else:
            with log.open("ab") as file:
                file.write(DAMAGE[damage])
        await done(start(pool), "plain")
    check_same(RunFolder(tmp_path, "plain"), await whole(config_for(model, **SHORT)))


TROUBLES = {
    "a dead actor": ConnectionError("the actor 'denoiser' is gone: ActorDiedError"),
    "no place": ResourcesUnavailable("the GPU actor found no place in this Ray cluster"),
    "a stale file handle": OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
    "a bug": ZeroDivisionError("division by zero"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_run_waits_until_its_trouble_is_over(start, tmp_path, model, whole, trouble):
    async with died_at_work(tmp_path, model, "plain") as pool:
        pool.trouble, pool.times = TROUBLES[trouble], 2
        second = start(pool)
        status = await second.status("plain")
        assert (status.state, status.ended, status.error) == ("waiting", False, None)
        assert str(TROUBLES[trouble]) in status.warning
        assert (status.num_segments, status.height) == (3, 32)
        assert [line_of(one) for one in await second.runs()] == [line_of(status)]
        assert "waiting" in line_of(status)
        assert set(await pool.recall()) == {"plain"}, "should this one die as well, the next knows it"
        with pytest.raises(RunLive, match="is active"):
            await second.extend("plain", str(tmp_path), 1, False)
        with pytest.raises(RunExists, match="taken"):
            await second.resume("plain", str(tmp_path / "elsewhere"), False)
        with pytest.raises(RunExists, match="taken"):
            await submit(second, tmp_path, "plain", config_for(model), "another")
        await done(second, "plain")
    check_same(RunFolder(tmp_path, "plain"), await whole(config_for(model, **SHORT)))


async def test_a_lock_that_a_dead_node_holds_for_a_while_costs_only_that_while(
    start, tmp_path, model, whole, monkeypatch
):
    """As NFS does until the lease is over. The other run is served, and the committed segments of this one too."""
    monkeypatch.setattr("edit_ray.actors.admission.LOCK_PATIENCE_S", 0.5)
    async with died_at_work(tmp_path, model, "plain", "other", calls=9, **TWO_ACTORS) as pool:
        manifest = RunFolder(tmp_path, "plain").read_manifest()
        lease = os.open(RunFolder(tmp_path, "plain").manifest, os.O_RDWR)
        fcntl.flock(lease, fcntl.LOCK_EX)
        second = start(pool)
        await done(second, "other")
        status = await second.status("plain")
        assert (status.state, status.committed) == ("waiting", len(manifest.segments))
        assert "another process is working on the run" in status.warning
        for index, record in enumerate(manifest.segments):
            assert (await second.wait_segment("plain", index, 1)).record == record
        reply = await second.wait_segment("plain", len(manifest.segments), 0.1)
        assert (reply.record, reply.status.state) == (None, "waiting")
        os.close(lease)
        await done(second, "plain")
    check_same(RunFolder(tmp_path, "plain"), await whole(config_for(model, **SHORT)), but=["run.yaml"])


async def test_a_folder_that_is_away_for_a_while_is_waited_for(start, tmp_path, model, whole):
    async with died_at_work(tmp_path, model, "plain") as pool:
        (tmp_path / "plain").rename(tmp_path / "unmounted")
        second = start(pool)
        status = await second.status("plain")
        assert (status.state, status.committed) == ("waiting", 0)
        assert "no run 'plain' under" in status.warning
        (tmp_path / "unmounted").rename(tmp_path / "plain")
        await done(second, "plain")
    check_same(RunFolder(tmp_path, "plain"), await whole(config_for(model, **SHORT)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("locked", [False, True])
async def test_a_run_that_waits_can_be_cancelled(start, tmp_path, model, monkeypatch, locked):
    def before():
        return [line["state"] for line in map(json.loads, folder.manifest.read_text().splitlines()) if "state" in line]

    monkeypatch.setattr("edit_ray.actors.admission.LOCK_PATIENCE_S", 0.5)
    folder = RunFolder(tmp_path, "plain")
    async with died_at_work(tmp_path, model, "plain") as pool:
        pool.trouble, pool.times = ConnectionError("the actor 'denoiser' is gone"), 10**6
        lease = os.open(folder.manifest, os.O_RDWR)
        if locked:
            fcntl.flock(lease, fcntl.LOCK_EX)
        second = start(pool)
        assert (await second.status("plain")).state == "waiting"
        stream = asyncio.create_task(second.wait_segment("plain", 3, 60))
        await asyncio.sleep(0)
        await second.cancel("plain")
        with pytest.raises(LookupError):  # then the client reads the folder
            await asyncio.wait_for(stream, 30)
        assert await pool.recall() == {}
        assert await second.runs() == []
        os.close(lease)
        pool.times = 0
        await second.resume("plain", str(tmp_path), False)
        assert before() == ([] if locked else ["cancelled"])
        await done(second, "plain")


async def test_a_run_whose_folder_is_silent_after_a_restart_can_be_cancelled(start, tmp_path, model, monkeypatch):
    answers, read = threading.Event(), RunFolder.read_manifest
    monkeypatch.setattr("edit_ray.actors.recovery.FIRST_TRIES_S", 0.1)
    monkeypatch.setattr("edit_ray.actors.recovery.SILENT_S", 0.1)
    async with died_at_work(tmp_path, model, "plain") as pool:
        monkeypatch.setattr(RunFolder, "read_manifest", lambda *arguments: answers.wait(60) and read(*arguments))
        second = start(pool)
        assert (await second.status("plain")).state == "waiting"
        await second.cancel("plain")
        async with asyncio.timeout(30):
            while await second.runs():
                await asyncio.sleep(0.01)
        assert await pool.recall() == {}, "the next one does not wait for it either"
        answers.set()
        await second.resume("plain", str(tmp_path), False)
        await done(second, "plain")


async def test_a_run_that_waits_is_tried_at_once_when_that_is_asked_for(start, tmp_path, model):
    async with died_at_work(tmp_path, model, "plain") as pool:
        pool.trouble, pool.times = ConnectionError("the actor 'denoiser' is gone"), 10**6
        second = start(pool)
        assert (await second.status("plain")).state == "waiting"
        with pytest.raises(ConnectionError, match="is gone"):
            await second.resume("plain", str(tmp_path), False)
        pool.times = 0
        async with asyncio.timeout(20):
            assert (await second.resume("plain", str(tmp_path), False)).state != "waiting"
            assert (await submit(second, tmp_path, "plain", config_for(model), "plain")).run_id == "plain"
        await done(second, "plain")


async def test_what_fails_after_a_run_was_opened_leaves_it_unlocked(start, tmp_path, model):
    """Metrics that cannot be served refuse to resume, and the run can be resumed all the same afterwards."""
    token, words = tmp_path / "token", "a token of many characters"
    token.write_text(words)
    async with died_at_work(tmp_path, model, "plain", metrics={"token_file": str(token)}) as pool:
        await pool.remember({})
        token.unlink()
        second = start(pool)
        with pytest.raises(ConfigError, match=r"metrics\.token_file"):
            await second.resume("plain", str(tmp_path), False)
        assert await second.runs() == []
        assert await pool.recall() == {}
        RunFolder(tmp_path, "plain").open().close()  # raises where somebody holds it
        token.write_text(words)
        await second.resume("plain", str(tmp_path), False)
        await done(second, "plain")


class Forgetful(Dying):
    """A cluster whose key-value store does not answer for a while, once a run is at work."""

    away = False

    async def remember(self, live):
        if self.away:
            raise ConnectionError("the key-value store does not answer")
        await super().remember(live)

    async def recall(self):
        if self.away:
            raise ConnectionError("the key-value store does not answer")
        return await super().recall()


async def test_a_key_value_store_that_is_away_keeps_no_run_from_its_end(start, tmp_path, model):
    scheduler = start(pool := Forgetful(1))
    await submit(scheduler, tmp_path, "one", config_for(model, **SHORT))
    await pool.now.wait()
    pool.away = True
    status = await end_of(scheduler, "one")
    await die(scheduler)
    asyncio.get_running_loop().call_later(0.5, setattr, pool, "away", False)
    second = start(pool)
    runs = await second.runs()
    pointers = await pool.recall()
    assert status.state == "done", status.error
    assert (runs, pointers) == ([], {}), "its folder says that it has ended"


async def test_actors_that_take_long_to_start_hold_no_thread_that_a_run_needs(start, tmp_path, model, monkeypatch):
    """Twenty starts wait for Ray; a run at work still writes its manifest."""

    def never(*_):
        asked.release()
        over.wait(120)
        raise ResourcesUnavailable("no place")

    asked, over = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr("edit_ray.actors.launch.placement_group_table", never)
    scheduler = start()
    config = config_for(model)
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    spec = RunSpec("waiting", tmp_path, config, 3)
    rays = RayPool()
    starts = [asyncio.create_task(rays.start(spec, worker)) for worker in range(20)]
    while not asked.acquire(blocking=False):
        await asyncio.sleep(0.01)
    await submit(scheduler, tmp_path, "one", config_for(model, **SHORT))
    assert (await done(scheduler, "one")).committed == 3
    over.set()
    await asyncio.gather(*starts, return_exceptions=True)


@pytest.mark.parametrize("there", [True, False])
async def test_a_short_start_timeout_takes_no_living_actor_s_place_away(tmp_path, model, monkeypatch, there):
    """The place that one's own call has made is given back; in another's, actors may be at work."""

    class Place:
        wait = staticmethod(lambda seconds: False)

    table = {"00": {"name": launch.PLACEMENT, "state": "CREATED"}} if there else {}
    removed = []
    for name, value in {
        "placement_group_table": lambda: table,
        "PlacementGroupID": bytes,
        "PlacementGroup": lambda _: Place,
        "placement_group": lambda *_, **__: Place,
        "remove_placement_group": removed.append,
    }.items():
        monkeypatch.setattr(launch, name, value)
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(launch.ray, name, dict)
    monkeypatch.setattr(launch.ray.util, "list_named_actors", lambda **_: [])
    config = config_for(model, engine={"start_timeout_s": 0.001})
    config = config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu"})})
    with pytest.raises(NoPlace, match="found no place"):
        await RayPool().start(RunSpec("one", tmp_path, config, 3), 0)
    assert removed == ([] if there else [Place])
