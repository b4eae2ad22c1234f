"""Runs of causal models with `kv: commit`: K/V rolls on from segment to segment, and is computed again if lost."""

import pytest
import torch

from edit_ray.actors.local import LocalWorker
from edit_ray.engine.causal_pipeline import _seeds
from edit_ray.engine.continuity import load_latents
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.chaos.storm import die
from tests.runs_here import (
    Dying,
    Pool,
    check_same,
    done,
    end_of,
    lose_the_gpu_actor,
    made,
    submit,
    told_from_the_start,
)
from tests.unit.test_actors_branches import branched
from tests.unit.test_actors_causal import (
    BLUE,
    OPTIONS,
    RED,
    SEED,
    SEGMENTS,
    STAGES,
    Library,
    config_of,
    generator_of,
    latents_of,
)
from tests.unit.test_actors_steering import Holding, steer

pytestmark = pytest.mark.usefixtures("one_thread")
ENTRY = 4096  # a page: that of a chunk in a layer is smaller
COMMIT = {"continuity": {"kv": "commit"}, "store": {"host_bytes": 4 * ENTRY, "allow_tmpfs": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("causal") / "wan", causal=OPTIONS)


def committing(model, **changes):
    continuity = COMMIT["continuity"] | changes.pop("continuity", {})
    return config_of(model, **COMMIT | changes | {"continuity": continuity})


def rolled_on(model, switch, **options):
    """The latents of a stream of the library that rolls on, and is sent the second prompt."""
    library = Library(model, **options)
    for segment in range(SEGMENTS):
        prompt = RED if segment < 2 else BLUE
        if segment == 0 or (segment == 2 and switch == "cut"):
            library.begin(segment, prompt)
        elif segment == 2:
            library.stream.send(prompt=prompt, switch=switch)
        library.stream._seeds = _seeds(generator_of(segment), 1)
        library.make()
    return library.latents


@pytest.mark.parametrize("switch", ["recache", "keep", "cut"])
@pytest.mark.parametrize("changes", [{}, {"rope": "absolute", "window": 3}, {"window": 1, "sink": 0}])
async def test_a_run_is_one_stream_whose_kv_rolls_on(whole, model, switch, changes):
    folder = await whole(committing(model, switch=switch, continuity=changes))
    assert torch.equal(latents_of(folder), rolled_on(model, switch, **changes))
    statistics = [record.statistics for record in folder.read_manifest().segments]
    fresh = {0} if switch == "keep" else {0, 2}
    assert [index for index, each in enumerate(statistics) if each["entries_read"] == 0] == sorted(fresh)
    shown = {2} if switch == "recache" else set()
    assert {index for index, each in enumerate(statistics) if each["recache_s"] > 0} == shown


async def lose_the_store(pool, worker, spec, *_):
    """As the death of a node with its disk does: the GPU actor, the store and what it has stored are gone."""
    pool.workers[worker].store.close()
    for path in spec.residuals_directory.glob("*.safetensors"):
        path.unlink()
    pool.workers[worker].store = LocalWorker(worker).store
    await lose_the_gpu_actor(pool, worker)


async def lose_entries(pool, worker, spec, segment, *_):
    """Some files of the disk tier are damaged, and the store starts anew."""
    pool.workers[worker].store.close()
    for path in sorted(spec.residuals_directory.glob("*.safetensors"))[::2]:
        path.write_bytes(b"damaged")
    pool.workers[worker].store = LocalWorker(worker).store


LOSSES = {"actor": lose_the_gpu_actor, "store": lose_the_store, "entries": lose_entries}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("strike", [*STAGES, ("finalize_run", None)])
@pytest.mark.parametrize("loss", LOSSES)
async def test_a_run_that_loses_its_actors_or_its_kv_makes_the_same_bytes(start, tmp_path, model, whole, loss, strike):
    config, pool = committing(model, switch="keep"), Pool({strike: LOSSES[loss]})
    folder = await made(start(pool), tmp_path, "one", config)
    assert not pool.strikes
    check_same(await whole(config), folder)
    assert list((tmp_path / ".cache_store").glob("*.safetensors")) == [], "nothing is left over"
    if strike[0] == "denoise_segment" and strike[1]:
        statistics = folder.read_manifest().segments[strike[1]].statistics
        computed = loss != "actor"
        assert (statistics["entries_read"] == 0, statistics["recache_s"] > 0) == (computed, computed)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("calls", range(1, 3 * SEGMENTS + 2))
@pytest.mark.parametrize("switch", ["recache", "keep", "cut"])
async def test_the_next_segment_scheduler_goes_on_to_the_same_bytes(start, tmp_path, model, whole, switch, calls):
    config, pool = committing(model, switch=switch), Dying(calls)
    first = start(pool)
    await submit(first, tmp_path, "one", config)
    await pool.now.wait()
    await die(first)
    await done(start(pool), "one")
    check_same(await whole(config), RunFolder(tmp_path, "one"))
    assert list((tmp_path / ".cache_store").glob("*.safetensors")) == []


async def test_kv_that_is_gone_is_computed_again_once(start, tmp_path, model, whole):
    """A stopped run has none any more. Resumed by other actors, its next segment computes it, and later ones read."""
    config, first = committing(model, switch="keep", video={"num_segments": SEGMENTS + 2}), start()
    await submit(first, tmp_path, "one", config)
    await first.wait_segment("one", 2, 60)
    await first.cancel("one")
    stopped = await end_of(first, "one")
    second = start()
    await second.resume("one", str(tmp_path), False)
    await done(second, "one")
    folder = RunFolder(tmp_path, "one")
    check_same(await whole(config), folder, but=["live-0.m3u8", "live-1.m3u8", "live.m3u8"])
    made_later = [record.statistics for record in folder.read_manifest().segments[stopped.committed :]]
    if made_later[0]["entries_read"]:  # it had been denoised before the stop
        made_later = made_later[1 if made_later[1]["entries_read"] == 0 else 2 :]
    assert [each["entries_read"] > 0 for each in made_later] == [False, *[True] * (len(made_later) - 1)]
    assert [each["recache_s"] > 0 for each in made_later] == [True, *[False] * (len(made_later) - 1)]


async def test_an_extended_run_is_the_run_that_was_as_long_from_the_start(start, tmp_path, model, whole):
    scheduler = start()
    folder = await made(scheduler, tmp_path, "one", committing(model, switch="keep", video={"num_segments": 3}))
    await scheduler.extend("one", str(tmp_path), 2, False)
    await done(scheduler, "one")
    assert torch.equal(latents_of(folder), latents_of(await whole(committing(model, switch="keep"))))


async def test_a_reroll_makes_what_a_run_with_its_prompt_and_seed_makes(start, tmp_path, model, whole):
    scheduler = start()
    folder = await made(scheduler, tmp_path, "one", committing(model, start=4, switch="keep"))
    for number, first in enumerate((3, 1), start=1):
        await scheduler.reroll("one", str(tmp_path), first, SEED, None, False)
        await done(scheduler, "one")
        takes = [folder.latents(index, number if index >= first else 0) for index in range(SEGMENTS)]
        made_again = torch.cat([load_latents(path) for path in takes], dim=2)
        assert torch.equal(made_again, latents_of(await whole(committing(model, start=4, switch="keep"))))


async def test_guidance_has_kv_of_both_branches_and_one_chunk_makes_a_segment(start, tmp_path, model, whole):
    changes = {"sampling": {"guidance_scale": 3.0, "num_frames": 1}, "continuity": {"chunks": 1}, "switch": "recache"}
    config, pool = committing(model, **changes), Pool({("denoise_segment", 3): lose_the_gpu_actor})
    folder = await made(start(pool), tmp_path, "one", config)
    check_same(await whole(config), folder)
    statistics = [record.statistics for record in folder.read_manifest().segments]
    assert [each["entries_read"] for each in statistics] == [0, 2 * 2, 0, 2 * 2 * 3, 2 * 2 * 4]


def test_what_stored_kv_excludes_is_one_sentence(model):
    for changes, words in (
        ({"video": {"num_segments": None}}, "an endless run must have kv recache"),
        ({"output": {"keep_segments": 3}}, "it must be null, because lost K/V is computed again from the latents"),
    ):
        with pytest.raises(ValueError, match=words):
            committing(model, **changes)


@pytest.mark.parametrize("changes", [{}, COMMIT], ids=["recache", "commit"])
async def test_a_run_that_is_steered_or_branched_is_one_whose_storyboard_said_so(
    start, tmp_path, model, whole, changes
):
    """Of an edit while segment 1 is made, which reads of segment 2 were planned without."""
    scheduler = start(pool := Holding(1))
    await submit(scheduler, tmp_path, "one", config_of(model, start=4, switch="keep", **changes))
    await pool.at_it.wait()
    await steer(scheduler, "one", prompt="a green circle")
    pool.go.set()
    await done(scheduler, "one")
    folder = RunFolder(tmp_path, "one")
    check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])
    await branched(scheduler, tmp_path, "branch", "one", 3, prompt=BLUE)
    await done(scheduler, "branch")
    folder = RunFolder(tmp_path, "branch")
    assert torch.equal(latents_of(folder), latents_of(await whole(told_from_the_start(folder))))


@pytest.mark.parametrize("changes", [{}, COMMIT], ids=["recache", "commit"])
async def test_damaged_latents_are_made_again(start, tmp_path, model, whole, changes):
    """Of a stopped run, in the middle of what is committed; then it goes on."""
    config, first = config_of(model, switch="keep", **changes), start()
    folder = RunFolder(tmp_path, "one")
    await submit(first, tmp_path, "one", config)
    await first.wait_segment("one", 2, 60)
    await first.cancel("one")
    await end_of(first, "one")
    folder.latents(1, 0).write_bytes(b"damaged")
    second = start()
    await second.resume("one", str(tmp_path), False, True)
    await done(second, "one")
    assert torch.equal(latents_of(folder), latents_of(await whole(config)))
