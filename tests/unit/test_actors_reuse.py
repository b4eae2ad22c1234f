"""Segments that reuse each other's residuals, through the actors' plain classes: only the plan decides the frames."""

import asyncio
import shutil

import pytest
import torch

from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.messages import run_key
from edit_ray.config import Config
from edit_ray.engine.continuity import load_latents, save_latents
from edit_ray.runs.event_log import read_events
from edit_ray.runs.folder import RunFolder
from edit_ray.runs.manifest import Ended
from edit_ray.testing import save_random_wan
from edit_ray.tiers.disk_tier import DiskTier
from edit_ray.tiers.entry_file import aligned_buffer, file_name, memory_of
from tests.runs_here import Pool, lose_the_gpu_actor, submit
from tests.unit.test_actors import generate as make
from tests.unit.test_manifest import BEGUN

SEGMENTS = 6
# 32 x 32, 5 frames: 2 latent frames of 4 x 4, so 8 tokens of width 24 in float32.
RESIDUAL = 8 * 24 * 4


FBCACHE = {"inner": "fbcache", "rel_l1_thresh": 0.2}
TAYLORSEER = {"inner": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 2, "max_order": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", num_layers=4)


def config_for(model, host=100, granularity="stack", shared_memory="require", later_steps=FBCACHE, **cache):
    reuse = {"policy": "warmstart_reuse", "warm_steps": 3, "reuse_window": 3, **later_steps}
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "sampling": {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 5},
            "video": {"num_segments": SEGMENTS},
            "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
            "continuity": {"mode": "none"},
            "cache": reuse | {"granularity": granularity} | cache,
            "store": {"host_bytes": host * 4096, "allow_tmpfs": True, "shared_memory": shared_memory},
            "engine": {"cpu_threads": 1, "idle_exit_s": 3600},
        }
    )


async def lose_the_store(pool, worker, *_):
    pool.workers[worker].store.close()
    pool.workers[worker].store = CacheStoreActor()


async def lose_both(pool, worker, *_):
    await lose_the_store(pool, worker)
    await lose_the_gpu_actor(pool, worker)


async def run_out_of_memory(pool, worker, spec, *_):
    """Once, at the third block."""

    def full(*_):
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    blocks = pool.workers[worker].denoiser._ready_engine(spec).pipe.transformer.blocks
    hook = blocks[2].register_forward_pre_hook(full)


async def damage_the_disk(_pool, _worker, spec, *_):
    """Turns over the last byte of every entry on disk."""
    for path in spec.residuals_directory.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def before(strikes):
    """A pool that is struck before these segments are denoised."""
    return Pool({("denoise_segment", segment): strike for segment, strike in strikes.items()})


async def generate(root, config, run_id, pool=None):
    status, records, pool = await make(root, config, run_id, pool)
    assert status.state == "done", status.error
    async with asyncio.timeout(10):  # the run is closed a moment later
        while list((root / ".cache_store").glob("*.safetensors")):
            await asyncio.sleep(0.01)
    await pool.end()
    return records


def latents_of(root, run_id):
    return torch.cat([load_latents(RunFolder(root, run_id).latents(k)) for k in range(SEGMENTS)])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("granularity", ["stack", pytest.param("per_block", marks=pytest.mark.slow), 3])
async def test_latents_are_the_same_in_much_memory_and_in_little(tmp_path, model, granularity):
    later = FBCACHE if granularity == "stack" else TAYLORSEER  # a unit of one block has none to spare for a probe
    records = await generate(tmp_path, config_for(model, 100, granularity, later_steps=later), "much")
    little = await generate(tmp_path, config_for(model, 2, granularity, later_steps=later), "little")
    carried = await generate(tmp_path, config_for(model, 2, granularity, "never", later), "carried")
    for other in ("little", "carried"):
        assert torch.equal(latents_of(tmp_path, "much"), latents_of(tmp_path, other))
    units = {"stack": 1, "per_block": 4, 3: 2}[granularity]
    for made in (records, little, carried):
        counts = [(r.statistics["entries_written"], r.statistics["entries_read"]) for r in made]
        opening = 3 * 2 * units
        assert counts == [(opening, 0), *[(0, opening)] * 3, (opening, 0), (0, opening)]
    assert all(record.statistics["host_bytes"] <= 2 * 4096 for record in little)
    last = little[-1].statistics
    assert last["prefetch_requested"] > 0
    assert last["prefetch_useful"] + last["prefetch_late"] > 0
    assert records[-1].statistics["prefetch_requested"] == 0, "everything was still in memory"


async def test_reuse_shows_in_what_is_computed_and_in_the_latents(tmp_path, model):
    values = config_for(model).model_dump(mode="json")
    made = {}
    for name, cache in (
        ("reusing", {"policy": "warmstart_reuse", "inner": "always", "warm_steps": 3, "reuse_window": 3}),
        ("alone", {"policy": "none"}),
    ):
        config = Config.model_validate(values | {"cache": cache})
        made[name] = (await generate(tmp_path, config, name)), latents_of(tmp_path, name)
    (reusing, first), (_, second) = made["reusing"], made["alone"]
    same = [torch.equal(first[k], second[k]) for k in range(SEGMENTS)]
    assert same == [True, False, False, False, True, False], "the first and the fifth have nothing to reuse"
    assert [record.statistics["units_skipped"] for record in reusing] == [0, 6, 6, 6, 0, 6]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """The folder and the records of a run to which nothing has happened."""
    root = tmp_path_factory.mktemp("whole")
    return root, asyncio.run(generate(root, config_for(model, 2), "whole"))


WITHOUT_SHARED_MEMORY = pytest.param("never", marks=pytest.mark.slow)


LOST = [
    {2: lose_the_store},
    {2: lose_the_gpu_actor},
    {1: lose_the_store, 3: lose_the_gpu_actor},
    {4: lose_both},
    {0: lose_the_gpu_actor, 3: run_out_of_memory, 5: lose_the_store},
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shared_memory", ["require", WITHOUT_SHARED_MEMORY])
@pytest.mark.parametrize("lost", LOST, ids=lambda lost: str({k: strike.__name__ for k, strike in lost.items()}))
async def test_a_lost_actor_or_too_little_memory_changes_no_latents(tmp_path, model, whole, lost, shared_memory):
    pool = before(lost)
    await generate(tmp_path, config_for(model, 2, shared_memory=shared_memory), "hurt", pool)
    assert not pool.strikes, "every planned loss happened"
    assert torch.equal(latents_of(whole[0], "whole"), latents_of(tmp_path, "hurt"))


async def test_each_segment_is_asked_for_before_the_one_before_it_ends(tmp_path, model):
    await generate(tmp_path, config_for(model), "one")
    events = [event for event in read_events(RunFolder(tmp_path, "one").events) if "segment" in event]
    at = {(event["event"], event["segment"]): event["monotonic"] for event in events}
    assert len(events) == len(at) == 3 * SEGMENTS - 1
    for k in range(1, SEGMENTS):
        assert at["segment_begun", k - 1] < at["prepare_asked", k] < at["segment_made", k - 1]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("damaged", "again", "shared_memory"),
    [([2], 1, "require"), ([1, 3], 2, "require"), ([2, 5], 2, "require"), ([2, 5], 2, "never")],
    ids=str,
)
async def test_residuals_that_the_disk_has_lost_are_made_again(tmp_path, model, whole, damaged, again, shared_memory):
    config = config_for(model, 2, shared_memory=shared_memory)
    hurt = await generate(tmp_path, config, "hurt", before(dict.fromkeys(damaged, damage_the_disk)))
    assert torch.equal(latents_of(whole[0], "whole"), latents_of(tmp_path, "hurt"))
    assert [sum(r.statistics["segments_made_again"] for r in records) for records in (whole[1], hurt)] == [0, again]


async def test_a_store_that_finds_nothing_where_it_was_gets_what_it_lacks(tmp_path, model, whole):
    async def lose_all(pool, worker, *_):
        shutil.rmtree(tmp_path / ".cache_store")
        await lose_both(pool, worker)

    await generate(tmp_path, config_for(model, 2), "hurt", before({2: lose_all}))
    assert torch.equal(latents_of(whole[0], "whole"), latents_of(tmp_path, "hurt"))


async def test_a_segment_that_does_not_come_out_as_it_was_ends_the_run(tmp_path, model):
    async def change(pool, worker, spec, *_):
        save_latents(spec.latents(0), load_latents(spec.latents(0)) + 1)
        await damage_the_disk(pool, worker, spec)

    status, _, pool = await make(tmp_path, config_for(model, 2), pool=before({2: change}))
    await pool.end()
    assert status.state == "failed"
    assert "segment 0 was made again, as residuals of it were lost, and its latents differ" in status.error


async def test_entries_of_runs_that_have_ended_go_and_those_of_runs_that_have_not_stay(start, tmp_path, model):
    left = DiskTier(tmp_path / ".cache_store", allow_tmpfs=True)
    states = {"done": "done", "failed": "failed", "killed": "running", "no-run": None, "no-manifest": None}
    memory = memory_of(aligned_buffer(8))

    def leave(run_id, submission=BEGUN.submission, plan=0):
        """What the store keeps of a run, of whom it was submitted by, and of which of its plans."""
        name = f"{run_key(run_id, submission)}.{plan}"
        left.write((name, 0, "transformer", "cond", 0, 1), memory, torch.uint8, (8,)).result()
        return name

    for run_id, state in states.items():
        leave(run_id)
        if run_id == "no-run":
            continue
        manifest = RunFolder(tmp_path, run_id).create("", BEGUN)
        if state in ("done", "failed"):
            manifest.append(Ended(1, state))
        manifest.close()
        if state is None:
            manifest.path.unlink()
    leave("done", plan=3)
    leave("killed", "another run of that name, in another folder")
    leave("one", plan=1)
    stays = {leave("killed"), leave("killed", plan=3)}
    left.close()

    scheduler = start(pool := Pool())
    await submit(scheduler, tmp_path, "one", config_for(model), "")
    await scheduler.wait_segment("one", 0, 60)
    found = {key[0] for key in pool.workers[0].store._tiers.disk.files.entries()}
    await scheduler.cancel("one")
    while not (await scheduler.wait_segment("one", SEGMENTS, 60)).status.ended:
        pass
    assert found == stays | {f"{run_key('one', '')}.0"}
    kept = {file_name((name, 0, "transformer", "cond", 0, 1)) for name in stays}
    assert {file.name for file in (tmp_path / ".cache_store").glob("*.safetensors")} == kept


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (
            {"host_bytes": RESIDUAL - 1},
            f"store.host_bytes is {RESIDUAL - 1}; one residual of this run has {RESIDUAL} bytes",
        ),
        ({"host_bytes": 2**49}, "of shared memory, and /dev/shm has"),
        ({"directory": "FILE"}, "store.directory is 'FILE', which is a file; it must be a folder"),
    ],
    ids=["too small", "too large", "no folder"],
)
async def test_a_store_that_cannot_be_made_ends_the_run_with_a_sentence(tmp_path, model, store, words):
    (tmp_path / "file").touch()
    config = config_for(model).model_dump(mode="json")
    config["store"] |= {key: str(tmp_path / "file") if value == "FILE" else value for key, value in store.items()}

    status, _, pool = await make(tmp_path, Config.model_validate(config))
    await pool.end()
    assert status.state == "failed"
    assert words.replace("FILE", str(tmp_path / "file")) in status.error
    assert "attempt" not in status.error, "another would fail the same way"
