"""With skipping on, latents do not depend on where residuals are: every store, every granularity, through the arena."""

import random
import time

import pytest
import torch

from edit_ray import EditWanPipeline
from edit_ray.cache import CPUOffloadStore, DiskOffloadStore, GPUStore, TieredStore
from edit_ray.cache.stores.arena import Arena
from edit_ray.cache.stores.disk_tier import DiskTier
from edit_ray.cache.stores.op_table import OpTable
from edit_ray.cache.stores.planned import PlannedStore
from edit_ray.cache.stores.shared_tiers import TABLES_BYTES, SharedTiers
from edit_ray.engine.options import SamplingOptions
from edit_ray.engine.reuse import plan_run_reuse
from edit_ray.testing import save_random_wan

SEGMENTS, WINDOW, STEPS = 8, 4, 6
SAMPLING = SamplingOptions(height=32, width=32, num_frames=5, num_inference_steps=STEPS, guidance_scale=3.0)
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 3.0}
WARM = {"warm_steps": 3, "inner": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 2, "max_order": 1}
RESIDUAL = 8 * 24 * 4  # [1, 8 tokens, 24] in float32
GRANULARITIES = ("stack", "per_block", 3)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = save_random_wan(tmp_path_factory.mktemp("model") / "wan", num_layers=6)
    pipe = EditWanPipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def segment_latents(pipe, segment):
    """One segment; its own prompt and noise."""
    return pipe(
        ("a red circle", "a blue square")[segment // 4],
        **CALL,
        generator=torch.Generator().manual_seed(segment),
        output_type="latent",
        max_sequence_length=16,
        reset_cache=False,
    ).frames


def in_process(pipe, granularity, store, prefetch=False):
    """All segments' latents, and how much was skipped."""
    cache = pipe.enable_cache("warmstart_reuse", STEPS, granularity, store, **WARM)
    made, skipped = [], 0
    for segment in range(SEGMENTS):
        cache.set_generation(segment)
        cache.set_reuse_window(range(max(0, segment - WINDOW), segment))
        if prefetch:
            cache.prefetch_reuse()
        made.append(segment_latents(pipe, segment))
        skipped += sum(decision.decision == "reuse" for decision in cache.record)
    pipe.disable_cache()
    assert skipped > 0
    return torch.cat(made)


def through_the_arena(pipe, granularity, folder, host_entries, prepare_ahead, delay=None):
    """The same through `SharedTiers` and `PlannedStore`, as the actors do it."""
    cache = pipe.enable_cache("warmstart_reuse", STEPS, granularity, **WARM)
    reuse = plan_run_reuse(pipe, "run", SEGMENTS, WINDOW, SAMPLING, None)
    assert reuse.form.size == RESIDUAL
    host = host_entries * 4096
    tiers = SharedTiers(Arena.create(host + TABLES_BYTES, folder), host, DiskTier(folder / "disk", allow_tmpfs=True))
    if delay is not None:
        tiers.disk.files.read, tiers.disk.files.write = delay(tiers.disk.files.read), delay(tiers.disk.files.write)
    arena = Arena.open(tiers.arena.path)
    tiers.follow(reuse.plan.uses())
    leases = {}

    def prepare(segment):
        leases[segment] = tiers.prepare("run", segment, 0, 1, reuse.ops(segment), reuse.form.dtype, reuse.form.shape)

    made = []
    for segment in range(SEGMENTS):
        for wanted in (segment, segment + 1) if prepare_ahead else (segment,):
            if wanted < SEGMENTS and wanted not in leases:
                prepare(wanted)
        lease, ops = leases[segment], reuse.ops(segment)
        table = OpTable(arena.memory(lease.table), lease.num_ops)
        store = PlannedStore(arena, table, ops, reuse.form, prefix=("run",), history_len=cache.history_len)
        cache.use_store(store, store.planned_reads())
        cache.set_generation(segment)
        cache.set_reuse_window({key[0] for key in store.planned_reads()})
        made.append(segment_latents(pipe, segment))
        store.finish()
        tiers.complete("run", segment, 0, 1)
    cache.use_store(GPUStore())
    pipe.disable_cache()
    assert tiers.statistics()["peak_bytes"]["host"] <= host
    arena.close()
    tiers.close()
    return torch.cat(made)


@pytest.fixture(scope="module")
def expected(pipe):
    return {granularity: in_process(pipe, granularity, GPUStore()) for granularity in GRANULARITIES}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_stores_of_one_process(pipe, expected, tmp_path, granularity):
    small = [(GPUStore(), 3 * RESIDUAL), (CPUOffloadStore(), 4 * RESIDUAL)]
    stores = [
        CPUOffloadStore(),
        DiskOffloadStore(tmp_path / "disk", allow_tmpfs=True),
        TieredStore([*small, (DiskOffloadStore(tmp_path / "last", allow_tmpfs=True), None)]),
    ]
    for store in stores:
        assert torch.equal(in_process(pipe, granularity, store), expected[granularity])
    assert stores[-1].num_spills > 0
    tiered = TieredStore([(GPUStore(), None), (CPUOffloadStore(), None)])
    assert torch.equal(in_process(pipe, granularity, tiered, prefetch=True), expected[granularity])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("host_entries", "prepare_ahead"), [(2, True), (2, False), (500, True)])
def test_through_the_arena(pipe, expected, tmp_path, granularity, host_entries, prepare_ahead):
    made = through_the_arena(pipe, granularity, tmp_path, host_entries, prepare_ahead)
    assert torch.equal(made, expected[granularity])


@pytest.mark.parametrize("longest_s", [0.02, pytest.param(0.2, marks=pytest.mark.slow)])
def test_random_delays_in_every_transfer(pipe, expected, tmp_path, longest_s):
    noise = random.Random(1)

    def delay(call):
        def delayed(*arguments):
            time.sleep(noise.random() * longest_s)
            return call(*arguments)

        return delayed

    made = through_the_arena(pipe, 3, tmp_path, 3, prepare_ahead=True, delay=delay)
    assert torch.equal(made, expected[3])
