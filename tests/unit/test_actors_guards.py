"""What goes wrong beside a run's work costs nobody a segment: clean-up, figures, logs, questions of clients."""

import asyncio
import errno
import math
import os
from dataclasses import replace

import pytest

from edit_ray.actors.local import LocalWorker
from edit_ray.actors.messages import RunSpec
from edit_ray.client import LongVideoClient
from edit_ray.errors import ConfigError, ResourcesUnavailable, StaleWork
from edit_ray.metrics.collect import MetricValues, RunMetrics
from edit_ray.runs.folder import RunFolder
from tests.prometheus import value_of
from tests.runs_here import Pool, config_for, done, end_of, submit
from tests.unit.test_run_metrics import Segment


def test_a_gpu_actor_does_no_work_of_an_earlier_life_of_a_run(tmp_path):
    """The segment scheduler that asks is dead already, and the next one waits for other answers."""
    earlier = RunSpec("one", tmp_path, config_for("no model"), 4, submission="mine")
    worker = LocalWorker()
    worker.denoiser.adopt_run(replace(earlier, incarnation=2))
    worker.denoiser.adopt_run(earlier)
    with pytest.raises(StaleWork, match="lives in a later incarnation than 1"):
        worker.denoiser.denoise_segment(earlier, earlier.segment(0), 0)
    worker.end()


# A commit ends with its line.


class Failing:
    """A function of `os` that fails once, or always, where its first argument is of a kind."""

    def __init__(self, name, concerns, number, times=1):
        self._real, self._concerns, self._number, self.left = getattr(os, name), concerns, number, times

    def __call__(self, subject, *arguments, **keywords):
        if self.left and self._concerns(subject):
            self.left -= 1
            raise OSError(self._number, os.strerror(self._number))
        return self._real(subject, *arguments, **keywords)


def is_media(path):
    return "/segments/" in os.fspath(path) and not isinstance(path, int)


def is_manifest_with_dropped(descriptor):
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if not path.endswith("manifest.jsonl"):
        return False
    with open(path, "rb") as file:
        return b'"dropped"' in file.read().splitlines()[-1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize(
    ("name", "concerns", "number"),
    [
        ("unlink", is_media, errno.EBUSY),
        ("fsync", is_manifest_with_dropped, errno.ENOSPC),
    ],
)
async def test_what_fails_after_the_manifests_line_fails_no_commit(
    start, tmp_path, model, monkeypatch, name, concerns, number, times
):
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config_for(model, output={"keep_segments": 1}))
    await scheduler.wait_segment("one", 0, 60)
    monkeypatch.setattr(os, name, failing := Failing(name, concerns, number, times))
    status, left = await end_of(scheduler, "one"), failing.left
    assert (status.state, status.committed, status.error) == ("done", 4, None)
    assert left < times, "it was hit"
    media = sorted(path.name for path in (tmp_path / "one" / "segments").iterdir())
    if times == 1:
        assert media == ["00003-t0.m4s"], "the next commit makes up for it"
        assert RunFolder(tmp_path, "one").read_manifest().dropped_before == 3


# Figures never fail what they tell of.


@pytest.mark.parametrize("bad", [-3600.0, math.nan, math.inf, -math.inf, 1e300], ids=repr)
def test_no_statistic_of_a_manifest_fails_the_metrics(bad):
    keys = ("denoise_s", "encode_s", "publish_s", "seam_score", "media_bytes", "steps_computed_cond", "reuse_wait_s")
    for key in keys:
        totals = MetricValues()
        runs = RunMetrics(totals)
        runs.opened("a", "none", 0)
        runs.committed("a", [Segment(0, 8, {key: bad}), Segment(1, 8, {key: 2.0})])
        assert value_of(totals, "edit_ray_segments_total") == 2
        assert all(math.isfinite(value) for value in totals.snapshot("").counts.values())


# What may be had again is asked for again.


@pytest.mark.parametrize("at", [("prepare_run", None), ("denoise_segment", 0)])
async def test_a_cluster_that_lacks_resources_for_a_while_fails_no_run(finish, model, at):
    async def no_place(*_):
        raise ResourcesUnavailable("the GPU actor found no place")

    status = await finish(config_for(model), pool=Pool({at: no_place}))
    assert status.state == "done", status.error


# Questions of clients.


async def test_a_segment_that_cannot_be_is_refused_in_a_sentence(start, tmp_path, model):
    scheduler, client = start(), LongVideoClient(output=tmp_path, connect=False)
    await submit(scheduler, tmp_path, "one", config_for(model))
    for index in (-1, 1.5, "0", True, None):
        with pytest.raises(ConfigError, match=r"index is .*; it must be a whole number of at least 0"):
            await scheduler.wait_segment("one", index, 0.1)
        with pytest.raises(ConfigError, match="whole number of at least 0"):
            client.wait_segment("one", index)
    await scheduler.cancel("one")
    await end_of(scheduler, "one")


async def test_a_question_for_a_far_segment_takes_only_what_is_there(start, tmp_path, model):
    """Nobody has taken what was not made: once the client has gone the run pauses again."""
    scheduler = start()
    await submit(scheduler, tmp_path, "one", config_for(model, engine={"max_ahead": 1, "cpu_threads": 1}))
    await scheduler.wait_segment("one", 10**6, 0.01)
    async with asyncio.timeout(60):
        while (status := await scheduler.status("one")).state not in ("paused", "done"):
            await asyncio.sleep(0.01)
    assert (status.state, status.committed) == ("paused", 1)
    reply = await scheduler.wait_segment("one", 3, 60)  # who waits for the last one takes those before it
    assert reply.record is not None
    await done(scheduler, "one")
