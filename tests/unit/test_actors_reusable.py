"""What a run that goes on may use of what is there: nothing that another plan, run or machine has made."""

import asyncio

import pytest

from edit_ray.actors.local import LocalPool, LocalWorker
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import ConfigError, HardwareDiffers, RunExists
from edit_ray.runs.event_log import read_events
from edit_ray.runs.folder import RunFolder
from tests.chaos.storm import die
from tests.removal import remove_folder
from tests.runs_here import Pool, check_same, config_for, done, end_of, made, submit

WARM = {"policy": "warmstart_reuse", "inner": "fbcache", "rel_l1_thresh": 0.2, "warm_steps": 1}
STORE = {"host_bytes": 16 * 4096, "allow_tmpfs": True}
LONG = {"num_frames": 81}
SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "seed": 5}


def config_of(model, segments, window=0, **changes):
    sampling = SMALL | changes.pop("sampling", {})
    reuse = {"cache": WARM | {"reuse_window": window}, "store": STORE} if window else {}
    video = {"num_segments": segments}
    return config_for(model, sampling=sampling, video=video, **reuse, **changes)


class Halted(Pool):
    """Stands still at a call, and sets `now`."""

    def __init__(self, at):
        super().__init__()
        self.halt_at(at)

    def halt_at(self, at):
        self.now, self.strikes[at] = asyncio.Event(), Halted.stand_still

    async def stand_still(self, *_):
        self.now.set()
        await asyncio.sleep(3600)


async def cancelled(root, config, at, run_id="one"):
    """A scheduler whose run was cancelled just before a call of its GPU actor, and its pool."""

    async def cancel(*_):
        await scheduler.cancel(run_id)
        await asyncio.sleep(0.2)

    pool = Pool({at: cancel})
    scheduler = SegmentSchedulerActor(pool)
    await submit(scheduler, root, run_id, config)
    assert (await end_of(scheduler, run_id)).state == "cancelled"
    return scheduler, pool


@pytest.mark.parametrize(
    "at",
    [
        ("decode_segment", 3),
        *(pytest.param(at, marks=pytest.mark.slow) for at in (("denoise_segment", 3), ("encode_segment", 1))),
    ],
    ids=str,
)
async def test_a_cancelled_run_that_is_extended_is_one_that_was_as_long_from_the_start(tmp_path, model, whole, at):
    """Whatever had latents when the cancel came, and whatever was committed."""
    scheduler, pool = await cancelled(tmp_path, config_of(model, 5, window=2), at)
    await scheduler.extend("one", str(tmp_path), 2, False)
    await done(scheduler, "one")
    await pool.end()
    undisturbed = await whole(config_of(model, 7, window=2))
    assert undisturbed.final.read_bytes() == RunFolder(tmp_path, "one").final.read_bytes()


async def lose_the_node(pool, worker, *_):
    """Its actors and its disk, all at once."""
    old, pool.workers[worker] = pool.workers[worker], LocalWorker(worker)
    old.store.close()
    for path in pool.root.glob(".cache_store/*.safetensors"):
        path.unlink()
    raise ConnectionError("the node is lost")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cancelled", "node lost"])
async def test_what_is_dropped_is_not_needed_to_make_lost_residuals_again(start, tmp_path, model, whole, kind):
    """Segments 4 to 7 reuse what 4 has left; it is made again from its own context, of 21 latents a segment."""
    config = config_of(model, 8, 3, sampling=LONG, output={"keep_segments": 1}, continuity={"history_latents": 1})
    if kind == "cancelled":
        scheduler, pool = await cancelled(tmp_path, config, ("denoise_segment", 7))
        await scheduler.resume("one", str(tmp_path), False)
    else:
        pool = Pool({("denoise_segment", 7): lose_the_node})
        pool.root = tmp_path
        scheduler = start(pool)
        await submit(scheduler, tmp_path, "one", config)
    await done(scheduler, "one")
    assert (await whole(config)).final.read_bytes() == RunFolder(tmp_path, "one").final.read_bytes()


async def test_runs_of_one_name_in_two_folders_do_not_read_each_others_residuals(start, tmp_path, model, whole):
    """Both have the store's folder of one node, and both were lost with their cluster."""

    async def half(name, seed):
        scheduler = start(pool := Halted(("denoise_segment", 2)))
        await submit(scheduler, tmp_path / name, "one", of(seed), token=name)
        await pool.now.wait()
        await die(scheduler)
        await pool.end()

    def of(seed):
        values = config_of(model, 4, window=3, sampling={"seed": seed}).model_dump(mode="json")
        values["store"]["directory"] = str(tmp_path / "nvme")
        return type(config_of(model, 4)).model_validate(values)

    runs = {"alice": 5, "bob": 6}
    for name, seed in runs.items():
        (tmp_path / name).mkdir()
        await half(name, seed)
    for name in runs:
        scheduler = start(pool := LocalPool())
        await scheduler.resume("one", str(tmp_path / name), False)
        await done(scheduler, "one")
        await pool.end()
    for name, seed in runs.items():
        check_same(RunFolder(tmp_path / name, "one"), await whole(of(seed)))
    assert list((tmp_path / "nvme").rglob("*.safetensors")) == []


class Nodes(Pool):
    """GPU actors on nodes of some kinds of hardware."""

    def __init__(self, *kinds, strikes=()):
        super().__init__(strikes)
        self.kinds = list(kinds)

    async def denoiser(self, worker, method, *arguments):
        said = await super().denoiser(worker, method, *arguments)
        return said | {"device": self.kinds[worker]} if method == "provenance" else said


@pytest.mark.parametrize("dies", ["at work", "while it rests"])
async def test_a_gpu_actor_that_comes_back_on_other_hardware_is_noticed(start, tmp_path, model, dies):
    async def come_back(pool, worker, *_):
        pool.kinds[worker] = "a sundial"
        await pool.restart_denoiser(worker)
        if dies == "at work":
            raise ConnectionError("the node is lost")

    scheduler = start(Nodes("an abacus", strikes={("denoise_segment", 2): come_back}))
    await submit(scheduler, tmp_path, "one", config_of(model, 4, window=3))
    failed = await end_of(scheduler, "one")
    with pytest.raises(HardwareDiffers, match="device was 'an abacus' and is 'a sundial'"):
        await scheduler.resume("one", str(tmp_path), False)
    before = RunFolder(tmp_path, "one").read_manifest()
    await scheduler.resume("one", str(tmp_path), True)
    done = await end_of(scheduler, "one")
    assert failed.state == "failed"
    assert "device was 'an abacus' and is 'a sundial'; --allow-different-hardware continues anyway" in failed.error
    assert before.provenance["device"] == "an abacus"
    assert (done.state, done.committed) == ("done", 4), done.error
    after = RunFolder(tmp_path, "one").read_manifest()
    assert after.provenance["device"] == "a sundial"
    assert after.segments[: len(before.segments)] == before.segments
    assert sum(record.statistics["segments_made_again"] for record in after.segments) == 0, "old hardware made those"


async def test_each_run_is_on_the_hardware_that_its_manifest_names(start, tmp_path, model):
    """Two GPU actors of two kinds: a run that goes on is compared with the one that it comes to."""
    scheduler = start(Nodes("an abacus", "a sundial"))
    config = config_of(model, 3, engine={"gpu_actors": 2})
    for run_id in ("one", "two"):
        await submit(scheduler, tmp_path, run_id, config)
    await scheduler.wait_segment("two", 0, 60)
    await scheduler.cancel("two")
    ends = [(await end_of(scheduler, run_id)).state for run_id in ("one", "two")]
    await scheduler.resume("two", str(tmp_path), False)
    ends.append((await end_of(scheduler, "two")).state)
    assert ends == ["done", "cancelled", "done"]
    for run_id in ("one", "two"):
        folder = RunFolder(tmp_path, run_id)
        workers = {event["worker"] for event in read_events(folder.events) if event["event"] == "gpu_actor"}
        assert [folder.read_manifest().provenance["device"]] == [["an abacus", "a sundial"][k] for k in workers]


async def test_a_run_may_go_on_on_other_hardware_and_reuses_nothing_from_before(start, tmp_path, model):
    scheduler, pool = await cancelled(tmp_path, config_of(model, 5, window=4), ("denoise_segment", 3))
    await pool.end()
    other = Nodes("a sundial")
    scheduler = start(other)
    await scheduler.resume("one", str(tmp_path), True)
    status = await end_of(scheduler, "one")
    manifest = RunFolder(tmp_path, "one").read_manifest()
    assert (status.state, manifest.provenance["device"]) == ("done", "a sundial"), status.error
    first = next(k for k in range(5) if manifest.segments[k].statistics["entries_read"] == 0 and k)
    assert manifest.segments[first].statistics["entries_written"] > 0, "what follows reuses this one"
    assert [record.statistics["segments_made_again"] for record in manifest.segments] == [0] * 5


async def test_a_reroll_that_lacks_latents_is_refused_before_anything_is_written(start, tmp_path, model):
    """Segments of 21 latents, of which the decoder looks back at more than those of one."""
    scheduler, config = start(), config_of(model, 5, sampling=LONG, output={"keep_segments": 3})
    folder = await made(scheduler, tmp_path, "one", config)
    before = folder.manifest.read_bytes()
    refused = r"--from is 2; .* from \d to 4, as the latents .* were dropped"
    with pytest.raises(ConfigError, match=refused) as said:
        await scheduler.reroll("one", str(tmp_path), 2, None, None, False)
    assert folder.manifest.read_bytes() == before
    first = int(str(said.value).split(" from ")[1][0])
    await scheduler.reroll("one", str(tmp_path), first, None, None, False)
    await done(scheduler, "one")
    assert [record.take for record in folder.read_manifest().segments] == [0] * first + [1] * (5 - first)


@pytest.mark.parametrize("keep", [1, 2])
async def test_the_first_segment_that_is_there_may_be_made_again(start, tmp_path, model, keep):
    """Nothing is continued here; only its seam cannot be measured, as what was before is gone."""
    config = config_of(model, 4, continuity={"mode": "none", "history_latents": 1}, output={"keep_segments": keep})
    await made(scheduler := start(), tmp_path, "one", config)
    await scheduler.reroll("one", str(tmp_path), 4 - keep, None, None, False)
    await done(scheduler, "one")
    assert [record.take for record in RunFolder(tmp_path, "one").read_manifest().segments] == [0] * (4 - keep) + [
        1
    ] * keep


@pytest.mark.one_in(2)
@pytest.mark.parametrize("window", [0, 2])
async def test_a_removed_run_leaves_nothing_to_the_next_one_of_its_name(start, tmp_path, model, whole, window):
    """Its scheduler was dead when its folder was removed, so that nobody told the other actors."""
    scheduler = start(pool := Halted(("encode_segment", 2)))  # decoded, and not encoded yet
    await submit(scheduler, tmp_path, "one", config_of(model, 4, window), token="first")
    await pool.now.wait()
    await die(scheduler)
    pool.halt_at(("encode_segment", 2))
    scheduler = start(pool)  # its second incarnation
    await scheduler.runs()
    await asyncio.wait_for(pool.now.wait(), 60)
    await die(scheduler)
    remove_folder(tmp_path / "one")
    scheduler = start(pool)
    config = config_of(model, 4, window, sampling={"seed": 6})
    await submit(scheduler, tmp_path, "one", config, token="second")
    await done(scheduler, "one")
    check_same(await whole(config), RunFolder(tmp_path, "one"))
    assert list((tmp_path / ".cache_store").rglob("*.safetensors")) == []


async def test_a_run_whose_file_system_is_away_keeps_its_name(start, tmp_path, model):
    """Removed is what is missing beside the client's probe; here nobody sees that either."""
    config, mounted, away = config_of(model, 4), tmp_path / "mounted", tmp_path / "away"
    mounted.mkdir()
    scheduler = start(pool := Halted(("encode_segment", 2)))
    await submit(scheduler, mounted, "one", config, token="first")
    await pool.now.wait()
    await die(scheduler)
    mounted.rename(away)
    scheduler = start(pool)
    assert (await scheduler.status("one")).state == "waiting"
    with pytest.raises(RunExists, match="taken"):
        await submit(scheduler, mounted, "one", config, token="second")
    away.rename(mounted)
    status = await end_of(scheduler, "one")
    assert (status.state, status.committed) == ("done", 4), status.error
    assert RunFolder(mounted, "one").read_manifest().begun.submission == "first"
