"""What a run's folder plays while the actors' classes make the run."""

import asyncio
import subprocess

import numpy as np
import pytest

from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.testing import save_random_wan
from edit_ray.video.encode import read_frames
from tests.unit.test_actors import Crew, config_for
from tests.unit.video_frames import reading

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan", expand_timesteps=True)


async def watch(root, config):
    """The frame counts of `stream.mp4` when each segment is told, and what ffmpeg sees that follows the playlist."""
    scheduler = SegmentSchedulerActor(Crew())
    await scheduler.submit("one", config.model_dump(mode="json"), str(root), str(root))
    counts, follower = [], None
    for index in range(config.num_segments):
        reply = await scheduler.wait_segment("one", index, 60)
        assert reply.record is not None, reply.status
        counts.append(len(await asyncio.to_thread(read_frames, root / "one" / "stream.mp4", **SIZE)))
        if follower is None:
            command = reading(root / "one" / "live.m3u8", "-live_start_index", "0")
            follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            seen = asyncio.create_task(asyncio.to_thread(follower.communicate, timeout=60))
    reply = await scheduler.wait_segment("one", config.num_segments, 60)
    assert reply.status.state == "done", reply.status.error
    raw, complaints = await seen
    assert (complaints, follower.returncode) == (b"", 0)
    return counts, np.frombuffer(raw, np.uint8).reshape(-1, *SIZE.values(), 3)


@pytest.mark.parametrize("fps", [16, 24])
def test_every_segment_can_be_seen_as_soon_as_it_is_told(tmp_path, model, fps):
    config = config_for(model, sampling={"fps": fps, "num_inference_steps": 8})
    counts, followed = asyncio.run(watch(tmp_path, config))
    ends = [17 + 12 * later for later in range(config.num_segments)]
    assert all(count in ends[index:] for index, count in enumerate(counts)), "whole segments, and this one among them"
    assert counts == sorted(counts)
    final = read_frames(tmp_path / "one" / "final.mp4", **SIZE)
    assert len(final) == config.num_frames_total == ends[-1]
    assert np.array_equal(followed, final)
