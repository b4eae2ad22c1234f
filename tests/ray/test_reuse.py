"""Segments that reuse each other's residuals, on Ray: a store of a process of its own, over shared memory and disk."""

import os
import signal
from pathlib import Path

import ray
import torch

from edit_ray import LongVideoClient
from edit_ray.actors import launch
from edit_ray.runs.event_log import read_events
from tests.ray.conftest import REUSE, pids, wait_until
from tests.unit.entry_folder import files_in
from tests.unit.test_leases import RUN, leases_on, make_segment


def generate(client, config, run_id, kills=None):
    """The bytes of the whole video and its statistics; `kills` names the actor that dies after a segment."""
    client.submit(config, run_id=run_id)
    statistics = []
    for segment in client.stream(run_id, frames=False):
        statistics.append(segment.statistics)
        if segment.index in (kills or {}):
            os.kill(pids()[kills[segment.index]], signal.SIGKILL)
    return (client.output / run_id / "final.mp4").read_bytes(), statistics


def test_killed_stores_and_gpu_actors_change_no_frame_with_shared_memory_and_without(
    ray_head, config, tmp_path, run_id
):
    client = LongVideoClient(output=tmp_path)
    path = config(steps=12, segments=6, more=REUSE)
    whole, statistics = generate(client, path, run_id)
    assert sum(segment["entries_read"] for segment in statistics) == 4 * 8
    assert all(segment["host_bytes"] <= 16384 for segment in statistics)
    assert statistics[-1]["prefetch_requested"] > 0
    events = read_events(tmp_path / run_id / "events.jsonl")
    at = {(event["event"], event["segment"]): event["monotonic"] for event in events if "segment" in event}
    assert all(at["prepare_asked", k] < at["segment_made", k - 1] for k in range(1, 6))
    hurt, _ = generate(client, path, f"{run_id}-hurt", {1: "cache_store", 3: "denoiser"})
    assert whole == hurt
    never = config(steps=12, segments=6, more=REUSE.replace("16KiB", "16KiB, shared_memory: never"))
    carried, statistics = generate(client, never, f"{run_id}-carried", {1: "cache_store"})
    assert whole == carried
    assert sum(segment["entries_read"] for segment in statistics) > 0
    assert list((tmp_path / ".cache_store").glob("*.safetensors")) == []
    mine = f"edit_ray-{pids()['cache_store']}-"
    assert wait_until(lambda: not [path for path in Path("/dev/shm").glob("edit_ray-*") if path.name.startswith(mine)])


def test_every_dtype_comes_back_bit_for_bit_through_ray_calls(ray_head, tmp_path):
    handle = ray.remote(num_cpus=0, max_concurrency=4)(launch.lazy_actor(launch.CACHE_STORE)).remote()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool):
        for shape in ((1, 8, 24), (1, 1025, 64), (1, 0, 8)):  # the second is large enough for the object store
            leases = leases_on(launch.StoreCalls(handle), tmp_path, "never", dtype, shape, host=256)
            assert sum(make_segment(leases, segment)[0] for segment in range(4)) == 3 * 8
            leases.close()
            ray.get(handle.call.remote("drop_run", RUN))
    ray.kill(handle)
    assert files_in(tmp_path / ".cache_store") == []
