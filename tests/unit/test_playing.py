"""What a run's folder plays while the actors' classes make the run."""

import asyncio
import subprocess

import numpy as np
import pytest

from edit_ray.video.encode import read_frames
from tests.runs_here import config_for, made
from tests.unit.video_frames import reading

SIZE = {"height": 32, "width": 32}


async def watch(scheduler, root, config):
    """How many frames `stream.mp4` has whenever it is read, and all that ffmpeg sees that follows the playlist."""
    making = asyncio.create_task(made(scheduler, root, "one", config))
    while not (root / "one" / "live.m3u8").exists():
        assert not making.done()
        await asyncio.sleep(0.01)
    command = reading(root / "one" / "live.m3u8", "-live_start_index", "0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        try:
            seen = asyncio.create_task(asyncio.to_thread(follower.communicate, timeout=60))
            counts = []
            while not making.done():
                counts.append(len(await asyncio.to_thread(read_frames, root / "one" / "stream.mp4", **SIZE)))
            raw, complaints = await seen
        finally:
            follower.kill()  # it would follow a playlist without an end for ever
    assert (complaints, follower.returncode) == (b"", 0)
    await making
    return counts, np.frombuffer(raw, np.uint8).reshape(-1, *SIZE.values(), 3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fps", [16, 24])
async def test_every_segment_can_be_seen_while_the_next_is_made(start, tmp_path, model, fps):
    config = config_for(model, sampling={"fps": fps, "num_inference_steps": 12})
    counts, followed = await watch(start(), tmp_path, config)
    ends = [9 + 4 * later for later in range(config.num_segments)]
    assert set(counts) <= set(ends), "whole segments only"
    assert counts == sorted(counts)
    assert counts[0] < config.num_frames_total, "it was watched before it was finished"
    final = read_frames(tmp_path / "one" / "final.mp4", **SIZE)
    assert len(final) == config.num_frames_total == ends[-1]
    assert np.array_equal(followed, final)
