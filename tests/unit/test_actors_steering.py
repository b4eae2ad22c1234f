"""Runs that are steered while they are made: every file is that of a run whose storyboard said so from the start."""

import asyncio
import contextlib
import os
import time

import pytest

from edit_ray import files
from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.errors import ConfigError, ResourcesUnavailable, RunEnded, RunLive, UnknownRun
from edit_ray.runs.folder import RunFolder
from tests.chaos.storm import die
from tests.runs_here import (
    ONE,
    PLAIN_AND_REUSE,
    SEGMENTS,
    Pool,
    check_same,
    config_for,
    done,
    end_of,
    everything,
    made,
    submit,
    told_from_the_start,
)

ASKING = {"video": {"num_segments": 3, "approve": "each"}}


async def steer(scheduler, run_id, from_segment=None, *, request="", **said):
    return await scheduler.steer(run_id, from_segment, said, request or repr((from_segment, said)))


async def until(scheduler, run_id, there):
    """The status of a run once it is as asked."""
    async with asyncio.timeout(60):
        while not there(status := await scheduler.status(run_id)):
            await asyncio.sleep(0.01)
    return status


async def held(scheduler, run_id, by="pause"):
    """Waits until nothing of the run is in flight any more."""
    return await until(scheduler, run_id, lambda status: status.state == "paused" and status.held_by == by)


class Holding(LocalPool):
    """Denoising of `segment` waits until `go` is set."""

    def __init__(self, segment):
        super().__init__()
        self.segment, self.at_it, self.go = segment, asyncio.Event(), asyncio.Event()

    async def denoiser(self, worker, method, *arguments):
        if method == "denoise_segment" and arguments[1].index == self.segment:
            self.at_it.set()
            await self.go.wait()
        return await super().denoiser(worker, method, *arguments)


@pytest.mark.parametrize("name", ["plain", "reuse"])
async def test_an_edit_holds_from_the_next_segment_that_has_not_begun(start, tmp_path, model, whole, name):
    pool = Holding(1)
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config_for(model, **PLAIN_AND_REUSE[name]))
    await pool.at_it.wait()
    said = {"prompt": "a blue square", "negative_prompt": "a red circle", "guidance_scale": 7, "seed": 9}
    edit = await steer(scheduler, "one", **said)
    assert (edit.start, edit.prompt, edit.guidance_scale, edit.seed) == (2, "a blue square", 7.0, 9)
    pool.go.set()
    await done(scheduler, "one")
    folder = RunFolder(tmp_path, "one")
    records = folder.read_manifest().segments
    assert [record.prompt for record in records] == ["a red circle"] * 2 + ["a blue square"] * 2
    config = told_from_the_start(folder)
    assert [entry.segment for entry in config.prompt_segments] == [0, 2]
    check_same(folder, await whole(config), but=["run.yaml"])


async def test_edits_are_kept_in_the_order_of_their_lines(start, tmp_path, model, whole):
    pool = Holding(0)
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config_for(model, video={"num_segments": 5}))
    await pool.at_it.wait()
    edits = [
        {"from_segment": 3, "prompt": "a blue square", "seed": 4},
        {"prompt": "a red square"},
        {"from_segment": 4, "seed": 8},
        {"from_segment": 0, "negative_prompt": "blue"},
    ]
    found = await asyncio.gather(*(steer(scheduler, "one", **edit) for edit in edits))
    assert [edit.start for edit in found] == [3, 1, 4, 1]
    folder = RunFolder(tmp_path, "one")
    assert set(folder.read_manifest().changes) == set(found)
    pool.go.set()
    await done(scheduler, "one")
    check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])


async def test_a_request_that_is_repeated_makes_one_edit(start, tmp_path, model):
    pool = Holding(0)
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    first = await steer(scheduler, "one", prompt="a blue square", request="the same")
    again = await steer(scheduler, "one", prompt="a blue square", request="the same")
    other = await steer(scheduler, "one", prompt="a blue square", request="another")
    assert first == again != other
    assert RunFolder(tmp_path, "one").read_manifest().changes == (first, other)
    await scheduler.cancel("one")
    pool.go.set()
    await end_of(scheduler, "one")


async def test_what_cannot_be_steered_is_told_in_a_sentence_and_nothing_is_written(start, tmp_path, model):
    pool = Holding(2)
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    await scheduler.wait_segment("one", 1, 60)
    lines = (folder := RunFolder(tmp_path, "one")).manifest.read_bytes()
    for said, words in (
        ({}, "an edit says nothing; it must have at least one of prompt, negative_prompt, guidance_scale, seed"),
        ({"prompt": None}, "an edit says nothing"),
        (
            {"from_segment": 1, "seed": 1},
            "from_segment is 1, which is committed; the next that can be edited is 3: `edit-ray",
        ),
        ({"from_segment": 4, "seed": 1}, "from_segment is 4; the last segment of run 'one' is 3"),
        ({"from_segment": -1, "seed": 1}, "from_segment is -1; it must be a whole number of at least 0"),
        ({"from_segment": True, "seed": 1}, "from_segment is True; it must be a whole number"),
        ({"prompt": ""}, "prompt is ''; it must be text of 1 to 2000 characters that is not blank"),
        ({"prompt": 3}, "prompt is 3; it must be text of 1 to 2000 characters"),
        ({"prompt": "a pelican"}, "prompt has words that this model does not know: 'pelican'"),
        ({"negative_prompt": "pelican"}, "negative_prompt has words that this model does not know"),
        ({"guidance_scale": 101}, "guidance_scale is 101; it must be a finite number from 0 to 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"seed": -1}, "seed is -1; it must be a whole number at least 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be"),
        ({"seed": 1, "request": "r" * 201}, "request has 201 characters; it must have 1 to 200"),
        ({"fps": 3}, "fps is an unknown field; an edit has prompt, negative_prompt, guidance_scale, seed"),
    ):
        with pytest.raises(ConfigError, match=words):
            await steer(scheduler, "one", **said)
    with pytest.raises(ConfigError, match=r"run 'one' does not wait for a yes: its video.approve is none"):
        await scheduler.approve("one", None)
    with pytest.raises(UnknownRun, match="no run 'two' here"):
        await scheduler.pause("two", True)
    assert folder.manifest.read_bytes() == lines
    pool.go.set()
    await until(scheduler, "one", lambda status: status.committed == SEGMENTS or ("denoise", 3) in status.at_work)
    with pytest.raises(
        (ConfigError, RunEnded), match=r"all 4 segments of run 'one' have begun|has ended|being stopped"
    ):
        await steer(scheduler, "one", seed=1)
    await done(scheduler, "one")
    for late in (steer(scheduler, "one", seed=1), scheduler.pause("one", True), scheduler.approve("one", 0)):
        with pytest.raises(
            RunEnded, match=r"has ended \(done\): `edit-ray reroll one --from K` makes .*`edit-ray branch"
        ):
            await late


async def test_guidance_of_a_run_that_reuses_is_not_edited_away(start, tmp_path, model):
    pool = Holding(0)
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config_for(model, **PLAIN_AND_REUSE["reuse"]))
    with pytest.raises(ConfigError, match=r"guidance_scale is 1 and sampling.guidance_scale 4; with"):
        await steer(scheduler, "one", guidance_scale=1.0)
    await scheduler.cancel("one")
    pool.go.set()
    await end_of(scheduler, "one")


async def test_a_paused_run_ends_what_has_begun_and_stays_paused_wherever_it_is_resumed(start, tmp_path, model, whole):
    pool = Holding(1)
    scheduler = start(pool)
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    status = await scheduler.pause("one", True)
    assert (status.state, status.held_by) == ("running", "pause")
    lines = (folder := RunFolder(tmp_path, "one")).manifest.read_bytes()
    assert (await scheduler.pause("one", True)).held_by == "pause"
    assert folder.manifest.read_bytes().count(b'"paused"') == lines.count(b'"paused"'), "said once"
    pool.go.set()
    assert (await held(scheduler, "one")).committed == 2
    edit = await steer(scheduler, "one", prompt="a blue square")
    assert edit.start == 2
    assert ((await held(scheduler, "one")).committed, folder.read_manifest().paused) == (2, True)
    await die(scheduler)
    scheduler = SegmentSchedulerActor(pool)  # its runs come back
    status = await until(scheduler, "one", lambda status: status.held_by == "pause")
    assert (status.state, status.committed) == ("queued", 2)
    await die(scheduler)
    other = start()  # of another cluster
    status = await other.resume("one", str(tmp_path), False)
    assert (status.state, status.held_by) == ("queued", "pause")
    await asyncio.sleep(0.1)
    assert (await other.status("one")).at_work == ()
    assert (await other.pause("one", False)).held_by is None
    await done(other, "one")
    check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])


async def test_a_paused_run_can_be_cancelled_and_leaves_its_gpu_actor_to_no_other(start, tmp_path, model):
    scheduler = start(pool := Holding(0))
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    await submit(scheduler, tmp_path, "two", config_for(model, **ONE))
    await scheduler.pause("two", True)  # while it is queued
    await scheduler.pause("one", True)
    pool.go.set()
    await held(scheduler, "one")
    await scheduler.cancel("one")
    assert (await end_of(scheduler, "one")).state == "cancelled"
    await asyncio.sleep(0.05)
    assert (await scheduler.status("two")).state == "queued"
    await scheduler.pause("two", False)
    await done(scheduler, "two")


async def test_a_run_that_asks_waits_after_each_segment_for_a_yes_or_a_reroll(start, tmp_path, model, whole):
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config_for(model, **ASKING))
    folder = RunFolder(tmp_path, "one")
    assert (await held(scheduler, "one", "approval")).committed == 1
    for segment, words in ((1, "segment is 1; it must be a committed one, from 0 to 0"), (-1, "segment is -1")):
        with pytest.raises(ConfigError, match=words):
            await scheduler.approve("one", segment)
    assert (await scheduler.approve("one", 0)).approved == 1
    await until(scheduler, "one", lambda status: status.committed == 2 and status.state == "paused")
    assert (await scheduler.approve("one", 0)).held_by == "approval", "a repeated yes is one yes"
    with pytest.raises(ConfigError, match="--from is 2; it must be a segment that was made and is there, from 0 to 1"):
        await scheduler.reroll("one", str(tmp_path), 2, None, None, False)
    waiting = asyncio.ensure_future(scheduler.wait_segment("one", 2, 60))
    await asyncio.sleep(0)
    await scheduler.reroll("one", str(tmp_path), 1, 77, "a blue square", False)
    assert b'"ended"' not in folder.manifest.read_bytes(), "whoever follows it does not see it end"
    await until(scheduler, "one", lambda status: status.committed == 2 and status.state == "paused")
    await scheduler.approve("one", None)
    assert (await waiting).record.take == 1
    await until(scheduler, "one", lambda status: status.committed == 3 and status.state == "paused")
    assert not folder.final.exists(), "the last one is asked for, too"
    await die(scheduler)
    scheduler = start()
    await scheduler.resume("one", str(tmp_path), False)
    assert (await held(scheduler, "one", "approval")).approved == 2
    await scheduler.approve("one", None)
    await done(scheduler, "one")
    manifest = folder.read_manifest()
    assert [record.take for record in manifest.segments] == [0, 1, 1]
    assert (manifest.approved, [take.start for take in manifest.takes]) == (3, [1])


async def test_what_a_client_has_seen_committed_can_be_approved_while_it_is_being_synced(start, tmp_path, model):
    class Slow(files.Disk):
        def fsync(self, descriptor):
            super().fsync(descriptor)
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("manifest.jsonl"):
                time.sleep(0.3)

    scheduler, folder = start(), RunFolder(tmp_path, "one")
    with files.swapped(Slow()):
        await submit(scheduler, tmp_path, "one", config_for(model, **ASKING))
        for segment in range(3):
            async with asyncio.timeout(60):
                while len(folder.read_manifest().segments) <= segment:
                    await asyncio.sleep(0.01)
            assert (await scheduler.approve("one", segment)).approved == segment + 1
        await done(scheduler, "one")


async def test_a_run_that_is_being_made_is_not_rerolled(start, tmp_path, model):
    scheduler = start(pool := Holding(1))
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    await scheduler.pause("one", True)
    with pytest.raises(RunLive, match="is active; wait for it to end"):
        await scheduler.reroll("one", str(tmp_path), 0, None, None, False)
    pool.go.set()
    await held(scheduler, "one")
    status = await scheduler.reroll("one", str(tmp_path), 0, None, None, False)
    assert (status.committed, status.held_by) == (0, "pause")
    await scheduler.pause("one", False)
    await done(scheduler, "one")


async def test_an_edit_whose_line_cannot_be_written_is_refused_and_does_not_hold(start, tmp_path, model, whole):
    class Full(files.Disk):
        def write(self, descriptor, parts, offset):
            if b'"edited"' in b"".join(parts):
                raise OSError(28, "No space left on device")
            return super().write(descriptor, parts, offset)

    scheduler = start(pool := Holding(0))
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    with files.swapped(Full()), pytest.raises(ResourcesUnavailable, match="no space is left in"):
        await steer(scheduler, "one", prompt="a blue square")
    pool.go.set()
    await done(scheduler, "one")
    check_same(RunFolder(tmp_path, "one"), await whole(config_for(model)))


async def test_latents_from_before_an_edit_are_not_taken_for_those_after_it(start, tmp_path, model, whole):
    """Segment 1 was denoised; its latents are damaged, so that it has not begun for the next life, which edits it."""
    pool = Pool()
    scheduler = start(pool)
    config = config_for(model)
    folder = RunFolder(tmp_path, "one")

    async def stop(*_):
        scheduler._stages._pool.strikes.clear()
        await asyncio.sleep(3600)

    pool.strikes[("encode_segment", 0)] = stop
    await submit(scheduler, tmp_path, "one", config)
    async with asyncio.timeout(60):
        while not folder.latents(1).exists():
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    await die(scheduler)
    kept = folder.latents(1).read_bytes()
    folder.latents(1).write_bytes(b"damaged")
    scheduler = SegmentSchedulerActor(held_up := Holding(1))
    await scheduler.resume("one", str(tmp_path), False)
    await scheduler.pause("one", True)
    with contextlib.suppress(ConfigError):
        assert (await steer(scheduler, "one", prompt="a blue square")).start in (1, 2)
    edit = folder.read_manifest().changes[0]
    await die(scheduler)
    folder.latents(1).write_bytes(kept)
    held_up.go.set()
    scheduler = start()
    await scheduler.resume("one", str(tmp_path), False)
    await scheduler.pause("one", False)
    await done(scheduler, "one")
    assert edit.start == 1
    check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])


async def test_a_steered_run_is_branched_as_it_is(start, tmp_path, model, whole):
    scheduler = start(pool := Holding(0))
    await submit(scheduler, tmp_path, "one", config_for(model))
    await pool.at_it.wait()
    await steer(scheduler, "one", prompt="a blue square")
    await steer(scheduler, "one", 3, seed=8)
    pool.go.set()
    await done(scheduler, "one")
    before = everything(RunFolder(tmp_path, "one"))
    await scheduler.branch("two", str(tmp_path), "one", 2, {"negative_prompt": "blue"}, None, False, "two")
    await done(scheduler, "two")
    folder = RunFolder(tmp_path, "two")
    check_same(folder, await whole(told_from_the_start(folder)), but=["run.yaml"])
    assert [entry.segment for entry in told_from_the_start(folder).prompt_segments] == [0, 1, 2, 3]
    assert everything(RunFolder(tmp_path, "one")) == before


async def test_a_branch_of_a_run_that_asks_has_its_shared_segments_approved(start, tmp_path, model):
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config_for(model, **ASKING))
    await held(scheduler, "one", "approval")
    await scheduler.cancel("one")
    await end_of(scheduler, "one")
    await scheduler.branch("two", str(tmp_path), "one", 1, {}, 2, False, "two")
    status = await until(scheduler, "two", lambda status: status.committed == 2 and status.state == "paused")
    assert (status.approved, status.held_by) == (1, "approval")
    await scheduler.approve("two", 1)
    await done(scheduler, "two")
    assert (await made(scheduler, tmp_path, "three", config_for(model, **ONE))).final.exists()
