"""The actors' plain classes, together, without Ray."""

import asyncio
import dataclasses
import errno
import json
import os
import pickle

import numpy as np
import pytest
import torch

from edit_ray.actors import work_loop
from edit_ray.actors.messages import RunSpec
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.cache.policies import POLICIES, Always
from edit_ray.config import load_config
from edit_ray.engine.continuity import load_latents, match_statistics
from edit_ray.engine.pipeline import EditWanPipeline
from edit_ray.errors import ConfigError, RunExists, UnknownRun
from edit_ray.runs.event_log import read_events
from edit_ray.runs.folder import RunFolder
from edit_ray.video.encode import read_frames
from tests.runs_here import ONE, Pool, check_same, config_for, lose_the_gpu_actor, submit


async def generate(root, config, run_id="one", pool=None):
    pool = pool or Pool()
    scheduler = SegmentSchedulerActor(pool)
    await submit(scheduler, root, run_id, config)
    records = []
    while (reply := await scheduler.wait_segment(run_id, len(records), 60)).record is not None:
        records.append(reply.record)
    assert reply.status.ended
    return reply.status, records, pool


def frames_of(root, config, run_id="one"):
    path = RunFolder(root, run_id).final
    return read_frames(path, height=config.sampling.height, width=config.sampling.width)


class WatchingPrompts(Pool):
    """Notes the prompts that are kept after each call of a method for a segment (None: of a run)."""

    def __init__(self):
        super().__init__()
        self.kept = []

    async def denoiser(self, worker, method, *arguments):
        reply = await super().denoiser(worker, method, *arguments)
        if engine := self.workers[worker].denoiser._model.engine:
            segment = getattr(arguments[1], "index", None) if len(arguments) > 1 else None
            self.kept.append(((method, segment), list(engine._embeds)))
        return reply


async def test_of_very_many_prompts_those_of_the_next_segments_are_encoded_and_kept(
    finish, tmp_path, model, monkeypatch
):
    """At Wan's size ten thousand would take 40 GB, and a long while before segment 0."""
    scenes = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "white") for shape in ("circle", "square")]
    changes = {"video": {"num_segments": 8}, "sampling": {"num_inference_steps": 1}}
    changes["prompt_segments"] = [{"segment": k, "prompt": prompt} for k, prompt in enumerate(scenes)]
    latents = []
    for most in (256, 8):
        monkeypatch.setattr("edit_ray.actors.gpu_work.KEPT_PROMPTS", most)
        monkeypatch.setattr("edit_ray.engine.segment.KEPT_PROMPTS", most)
        pool = WatchingPrompts()
        status = await finish(config_for(model, **changes), f"kept-{most}", pool)
        assert status.state == "done", status.error
        latents.append([load_latents(RunFolder(tmp_path, f"kept-{most}").latents(k)) for k in range(8)])
    kept = dict(pool.kept)
    assert set(kept["prepare_run", None]) == {*scenes[:2], ""}
    assert [k for k in range(0, 8, 2) if scenes[k + 1] not in kept["denoise_segment", k]] == []
    assert max(len(prompts) for _, prompts in pool.kept) <= 8
    assert all(map(torch.equal, *latents))


async def test_a_run_makes_exactly_the_promised_frames(tmp_path, model):
    config = config_for(model)
    status, records, _ = await generate(tmp_path, config)
    assert status.state == "done", status.error
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert [record.prompt for record in records] == ["a red circle"] * 2 + ["a blue square"] * 2
    assert len(frames_of(tmp_path, config)) == 9 + 3 * 4 * (3 - 2) == config.num_frames_total
    manifest = RunFolder(tmp_path, "one").read_manifest()
    assert manifest.state == "done"
    assert manifest.final == "final.mp4"
    assert manifest.segments == tuple(records)
    assert [record.media for record in records] == [f"segments/0000{index}-t0.m4s" for index in range(4)]
    assert ["seam_score" in record.statistics for record in records] == [False, True, True, True]
    plays = [tmp_path / "one" / name for name in ("stream.mp4", "live.m3u8", "final.mp4")]
    size = {"height": config.sampling.height, "width": config.sampling.width}
    stream, live, final = (read_frames(path, **size) for path in plays)
    assert np.array_equal(stream, final)
    assert np.array_equal(live, final)
    assert (tmp_path / "one" / "live-0.m3u8").read_text().endswith("#EXT-X-ENDLIST\n")
    left = [path.name for path in (tmp_path / "one").rglob("*") if path.name.startswith(".")]
    assert left == [], "nothing half-written stays"


async def test_what_cannot_be_written_or_freed_keeps_no_run_from_its_end(tmp_path, model, monkeypatch):
    append, failed = work_loop.append_event, []

    def fails_once(path, event, **fields):
        if not failed:
            failed.append(event)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        append(path, event, **fields)

    class Unlucky(Pool):
        async def store(self, worker, method, *arguments):
            if method == "drop_run":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return await super().store(worker, method, *arguments)

    monkeypatch.setattr(work_loop, "append_event", fails_once)
    status, records, _ = await generate(tmp_path, config_for(model, **ONE), pool=Unlucky())
    assert (status.state, len(records)) == ("done", 1)
    assert failed == ["gpu_actor"]
    said = [event for event in read_events(RunFolder(tmp_path, "one").events) if event["event"] == "gpu_actor"]
    assert [event["worker"] for event in said] == [0], "who goes on with the run is told where it was"


@pytest.mark.usefixtures("one_thread")
async def test_segment_0_equals_the_library(tmp_path, model):
    config = config_for(model, **ONE)
    await generate(tmp_path, config)
    pipe = EditWanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    names = ("negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    sampling = {name: getattr(config.sampling, name) for name in names}
    seeded = torch.Generator().manual_seed(config.sampling.seed)
    expected = pipe("a red circle", **sampling, generator=seeded, output_type="latent").frames
    assert torch.equal(load_latents(RunFolder(tmp_path, "one").latents(0)), expected)


MODES = {
    "none": {"mode": "none"},
    "hybrid": {"mode": "overlap", "overlap_source": "hybrid", "adain": 0.1},
    "latent": {"mode": "overlap", "overlap_source": "latent"},
    "reencode": {"mode": "overlap", "overlap_source": "reencode"},
    "history": {"mode": "history"},
}
SOME = [("denoise_segment", 1), ("decode_segment", 2)]
LOST = [
    *((mode, SOME) for mode in MODES),
    ("history", [("prepare_run", None)]),
    ("history", [("denoise_segment", 0)]),
    ("history", [("denoise_segment", 2), ("decode_segment", 2)]),
    ("history", [("decode_segment", 1), ("finalize_run", None)]),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("mode", "lost"), LOST)
async def test_a_lost_actor_changes_no_frame(tmp_path, model, mode, lost):
    config = config_for(model, continuity=MODES[mode] | {"history_latents": 2})
    for name, strikes in (("whole", ()), ("hurt", dict.fromkeys(lost, lose_the_gpu_actor))):
        status, records, pool = await generate(tmp_path, config, name, Pool(strikes))
        assert status.state == "done", status.error
        assert sum(record.num_frames for record in records) == config.num_frames_total
        assert pool.strikes == {}, "every planned failure happened"
    check_same(RunFolder(tmp_path, "whole"), RunFolder(tmp_path, "hurt"))


async def test_adain_draws_what_a_segment_adds_towards_the_first_segment(tmp_path, model):
    async def latents(run_id, factor):
        config = config_for(model, continuity={"mode": "history", "adain": factor}, video={"num_segments": 3})
        await generate(tmp_path, config, run_id)
        return [load_latents(RunFolder(tmp_path, run_id).latents(index)) for index in range(3)]

    plain, drawn = await latents("plain", 0.0), await latents("drawn", 0.25)
    assert torch.equal(drawn[0], plain[0])
    assert torch.equal(drawn[1], match_statistics(plain[1], plain[0], 0.25))
    assert not torch.equal(drawn[2], match_statistics(plain[2], plain[0], 0.25)), "it continues what was drawn"


async def test_a_segment_that_always_fails_ends_the_run_with_its_reason(tmp_path, model):
    class Broken(Pool):
        async def denoiser(self, worker, method, *arguments):
            if method == "decode_segment":
                raise OSError("no space left")
            return await super().denoiser(worker, method, *arguments)

    config = config_for(model, engine={"cpu_threads": 1, "segment_retries": 1})
    status, records, _ = await generate(tmp_path, config, pool=Broken())
    assert status.state == "failed"
    assert records == []
    assert status.error == "decode of segment 0 failed (attempt 2 of 2): OSError: no space left"
    assert RunFolder(tmp_path, "one").read_manifest().error == status.error


async def test_a_run_stops_between_two_steps_and_keeps_what_is_committed(start, tmp_path, model):
    config = config_for(model, sampling={"num_inference_steps": 200})
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config)
    async with asyncio.timeout(30):
        while (await scheduler.status("one")).progress is None:
            await asyncio.sleep(0.01)
    await scheduler.cancel("one")
    reply = await scheduler.wait_segment("one", 0, 20)
    assert reply.status.state == "cancelled"
    assert RunFolder(tmp_path, "one").read_manifest().state == "cancelled"


async def test_the_actors_end_when_idle(start, tmp_path, model):
    ended = []

    class Ending(Pool):
        async def end(self):
            ended.append(True)

    config = config_for(model, engine={"cpu_threads": 1, "idle_exit_s": 0.05}, **ONE)
    scheduler = start(Ending())
    await submit(scheduler, tmp_path, "one", config)
    await scheduler.wait_segment("one", 1, 60)
    await asyncio.sleep(0.5)
    assert ended == [True]


async def test_what_cannot_run_is_refused_before_anything_is_written(start, tmp_path, model):
    config = config_for(model)

    async def ask(values, probe=tmp_path):
        await start().submit("one", values, str(tmp_path / "root"), str(probe), "")

    wrong = config.model_dump(mode="json")
    wrong["sampling"]["height"] = 40
    with pytest.raises(ConfigError, match=r"sampling\.height"):
        await ask(wrong)
    with pytest.raises(ConfigError, match=r"does not see .*root; choose a folder that all nodes"):
        await ask(config.model_dump(mode="json"), tmp_path / "only on another node")
    assert not (tmp_path / "root").exists()
    (tmp_path / "root" / "one").mkdir(parents=True)
    with pytest.raises(RunExists, match="'one' is taken"):
        await ask(config.model_dump(mode="json"))


async def test_a_policy_is_made_where_it_is_read_where_it_is_admitted_and_for_use(start, tmp_path, model, monkeypatch):
    made = []

    class Counted(Always):
        def __init__(self):
            made.append(1)

    monkeypatch.setattr(POLICIES, "_classes", {**POLICIES._classes, "counted": Counted})
    values = config_for(model, video={"num_segments": 3}, cache={"policy": "counted"}).model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    config = load_config(tmp_path / "run.yaml")
    assert made == [1]
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config)
    assert made == [1, 1]
    await scheduler.wait_segment("one", 2, 60)
    assert made == [1, 1, 1]


async def test_an_unknown_run_is_named(start):
    with pytest.raises(UnknownRun, match="no run 'nobody'"):
        await start().status("nobody")


def test_a_spec_survives_the_way_between_processes(tmp_path, model):
    spec = RunSpec("one", tmp_path, config_for(model), 4)
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert again.plan == spec.plan
    assert dataclasses.asdict(again.plan) == dataclasses.asdict(spec.plan)
