"""What torch holds of a GPU is shown as a metric, and given back where room is needed; a second GPU is found."""

import pytest
import torch

from edit_ray.actors.gpu_work import show_memory
from edit_ray.engine.loading import second_gpu
from edit_ray.engine.options import ModelOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.metrics.collect import MetricValues, series

MIB = 2**20


def shown():
    totals = MetricValues()
    show_memory(totals, torch.device("cuda"))
    gauges = totals.snapshot("").gauges
    return {kind: gauges[series("edit_ray_gpu_memory_bytes", kind=kind)] for kind in ("allocated", "reserved", "total")}


def test_what_is_held_is_shown():
    before, held = shown(), torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    after = shown()
    assert after["allocated"] - before["allocated"] == held.nbytes
    assert after["allocated"] <= after["reserved"] <= after["total"]


def test_what_is_free_again_is_given_back():
    engine = SegmentEngine.load(ModelOptions(path="builtin:tiny_wan", device="cuda"))
    torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")  # free at once, and kept by torch for what comes
    before = shown()
    engine.free_memory(of_cache=True)
    after = shown()
    assert before["reserved"] - after["reserved"] >= 256 * MIB
    assert after["allocated"] == before["allocated"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_another_one():
    assert second_gpu() == torch.device("cuda", 1)
