"""Wall clocks jump, as with NTP or when a virtual machine is resumed: no byte, no figure, no run depends on them."""

import asyncio
import math
import random
import threading
import time
from collections import Counter

import pytest

from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.runs.folder import RunFolder
from tests.chaos.storm import die
from tests.runs_here import PLAIN_AND_REUSE, SHORT, Dying, check_same, config_for, submit
from tests.unit.test_actors_metrics import samples_in

JUMPS = (-3600.0, -0.001, 0.001, 3600.0)  # seconds
COUNTERS = ("edit_ray_segments_total", "edit_ray_frames_total", "edit_ray_media_bytes_total")


class WallClock:
    """`time.time` that jumps whenever it is looked at, by one of `jumps` drawn at random; `hit` counts when it did."""

    def __init__(self, seed, jumps=JUMPS):
        self._draw, self._jumps, self._offset = random.Random(seed), jumps, 0.0
        self._real, self._lock = time.time, threading.Lock()
        self.hit = Counter()

    def jump(self, stage):
        with self._lock:
            self._offset += self._draw.choice(self._jumps)
            self.hit[stage] += 1

    def __call__(self):
        self.jump("at a look")
        return self._real() + self._offset


class Watched(Dying):
    """The clock jumps at the beginning of each stage as well."""

    clock = None

    async def denoiser(self, worker, method, *arguments):
        if method.endswith(("_run", "_segment", "provenance")):
            self.clock.jump(method)
        return await super().denoiser(worker, method, *arguments)


async def live_through(root, config, name, clock, deaths):
    """A run under that clock, whose segment scheduler dies after so many calls; the counts must never fall."""
    pool = Watched(0)
    pool.clock = clock
    scheduler = SegmentSchedulerActor(pool)
    await submit(scheduler, root, name, config)
    for calls in deaths:
        pool.left, pool.now = calls, asyncio.Event()
        await asyncio.wait_for(pool.now.wait(), 60)
        await die(scheduler)
        clock.jump("recovery")
        scheduler = SegmentSchedulerActor(pool)
    index, before = 0, dict.fromkeys(COUNTERS, 0.0)
    while (reply := await scheduler.wait_segment(name, index, 60)).record is not None or not reply.status.ended:
        index += reply.record is not None
        samples = await samples_in(root)
        now = {counter: samples(counter) for counter in COUNTERS}
        assert all(now[counter] >= before[counter] for counter in COUNTERS), (before, now)
        before = now
    assert reply.status.state == "done", reply.status.error
    samples = await samples_in(root)
    records = RunFolder(root, name).read_manifest().segments
    assert samples("edit_ray_segments_total") == len(records) == 3
    await pool.end()
    for record in records:
        seconds = {key: value for key, value in record.statistics.items() if key.endswith("_s")}
        assert {"denoise_s", "decode_s", "encode_s", "publish_s"} <= set(seconds)
        assert all(math.isfinite(value) and 0 <= value < 60 for value in seconds.values()), seconds


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("seed", "name", "deaths"), [(1, "plain", ()), (2, "reuse", (5,)), (3, "plain", (2, 4))])
async def test_whatever_the_wall_clock_says_the_bytes_are_the_same(
    tmp_path, model, whole, monkeypatch, seed, name, deaths
):
    clock, config = WallClock(seed), config_for(model, **PLAIN_AND_REUSE[name], **SHORT)
    undisturbed = await whole(config)
    monkeypatch.setattr(time, "time", clock)
    await live_through(tmp_path, config, name, clock, deaths)
    check_same(RunFolder(tmp_path, name), undisturbed)
    assert clock.hit["at a look"] >= 3 * 3, "each segment looks at it when it is denoised, encoded and committed"
