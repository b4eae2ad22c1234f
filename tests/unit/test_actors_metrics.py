"""What the actors' plain classes count is what the run's manifest says, whoever dies in between."""

import asyncio

import pytest

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import ConfigError
from edit_ray.metrics.exporter import TARGETS
from edit_ray.runs.folder import RunFolder
from tests.chaos.storm import die
from tests.prometheus import page_of, samples_of
from tests.runs_here import ONE, REUSE, Dying, Pool, config_for, done, end_of, lose_the_gpu_actor, made, submit


async def samples_in(root):
    return samples_of(await asyncio.to_thread(page_of, root))


def check(samples, manifest, policy):
    figures = [segment.statistics for segment in manifest.segments]
    assert samples("edit_ray_segments_total") == len(figures) == 4
    assert samples("edit_ray_frames_total") == sum(segment.num_frames for segment in manifest.segments)
    for what in ("steps", "units"):
        for branch in ("cond", "uncond"):
            for decision in ("computed", "skipped"):
                told = samples(f"edit_ray_{what}_total", policy=policy, branch=branch, decision=decision)
                assert told == sum(of.get(f"{what}_{decision}_{branch}", 0) for of in figures)
    for direction in ("read", "written"):
        told = samples("edit_ray_reuse_bytes_total", direction=direction)
        assert told == sum(of.get(f"reuse_{direction}_bytes", 0) for of in figures)


async def test_an_actor_that_cannot_say_its_metrics_is_named_and_costs_no_run(finish, model, caplog):
    class Mute(LocalPool):
        async def denoiser(self, worker, method, *arguments):
            if method == "metrics":
                raise ZeroDivisionError("division by zero")
            return await super().denoiser(worker, method, *arguments)

    assert (await finish(config_for(model), "one", Mute())).state == "done"
    assert "could not ask an actor for its metrics: ZeroDivisionError: division by zero" in caplog.text


async def test_the_counts_are_those_of_the_manifest(finish, tmp_path, model):
    pool = Pool({("denoise_segment", 2): lose_the_gpu_actor})
    assert (await finish(config_for(model, **REUSE), "one", pool)).state == "done"
    samples = await samples_in(tmp_path)
    check(samples, RunFolder(tmp_path, "one").read_manifest(), "warmstart_reuse")
    assert samples("edit_ray_steps_total", policy="warmstart_reuse", branch="cond", decision="skipped") > 0
    assert samples("edit_ray_reuse_bytes_total", direction="read") > 0
    assert samples("edit_ray_work_failed_total", stage="denoise", trouble="actor_died") == 1
    assert samples("edit_ray_runs_ended_total", outcome="done") == 1
    assert RunFolder(tmp_path, "one").read_manifest().state == "done"


async def test_a_store_whose_tiers_are_closed_and_made_again_goes_on_counting(start, tmp_path, model):
    """The same run twice, in one CacheStore actor: every count of it is there twice."""
    pool, told = LocalPool(), []
    scheduler = start(pool)
    for run_id in ("one", "two"):
        await made(scheduler, tmp_path, run_id, config_for(model, **REUSE))
        told.append(await pool.store(0, "metrics"))
    first, second = told
    assert first.incarnation == second.incarnation
    lookups = [of for of in first.counts if of[0] == "edit_ray_tier_lookups_total" and of[1][0] == "host"]
    reads = sum(first.counts[of] for of in lookups)
    assert reads > 0
    assert sum(second.counts[of] for of in lookups) == 2 * reads
    assert all(second.counts[of] >= value for of, value in first.counts.items())
    assert second.gauges == {}, "the tiers are closed"


async def test_without_a_cache_every_step_counts_as_computed(finish, tmp_path, model):
    await finish(config_for(model))
    samples = await samples_in(tmp_path)
    check(samples, RunFolder(tmp_path, "one").read_manifest(), "none")
    assert samples("edit_ray_steps_total", policy="none", branch="uncond", decision="computed") == 4 * 3


async def test_a_segment_scheduler_that_is_started_again_has_the_same_counts(start, tmp_path, model):
    first = start(pool := Dying(9))
    await submit(first, tmp_path, "one", config_for(model, **REUSE))
    await pool.now.wait()
    await die(first)
    second = start(pool)
    await done(second, "one")
    check(await samples_in(tmp_path), RunFolder(tmp_path, "one").read_manifest(), "warmstart_reuse")


async def test_a_place_that_cannot_be_had_refuses_the_run_and_writes_nothing(start, tmp_path, model):
    token = tmp_path / "token"
    token.write_text("a token of many characters")
    scheduler = start()
    config = config_for(model, metrics={"address": "192.0.2.1", "token_file": str(token)})
    with pytest.raises(ConfigError, match=r"metrics\.address"):
        await submit(scheduler, tmp_path, "one", config)
    assert not (tmp_path / "one").exists()
    await submit(scheduler, tmp_path, "two", config_for(model, metrics={"enabled": False}))
    await end_of(scheduler, "two")
    assert not (tmp_path / TARGETS).exists()


def test_targets_go_when_the_scheduler_ends(tmp_path, model):
    async def run():
        scheduler = SegmentSchedulerActor(LocalPool())
        await made(scheduler, tmp_path, "one", config_for(model, **ONE))
        assert (tmp_path / TARGETS).exists()

    asyncio.run(run())
    assert not (tmp_path / TARGETS).exists()


async def test_what_one_that_died_told_prometheus_goes_though_no_run_lives(start, tmp_path, model):
    pool, targets = LocalPool(), tmp_path / TARGETS
    first = start(pool)
    await made(first, tmp_path, "one", config_for(model, **ONE))
    await die(first)
    told = targets.read_text()
    await start(pool).runs()
    assert not targets.exists()
    others = told.replace("127.0.0.1", "127.0.0.2")  # of another Ray's segment scheduler
    targets.write_text(others)
    await start(pool).runs()
    assert targets.read_text() == others
