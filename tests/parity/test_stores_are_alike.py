"""With skipping on, latents do not depend on where residuals are: every store, every granularity, through the arena."""

import random
import time

import pytest
import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.cache import CPUOffloadStore, DiskOffloadStore, GPUStore, TieredStore
from edit_ray.config import Config
from edit_ray.engine.options import SamplingOptions
from edit_ray.engine.reuse import plan_run_reuse
from edit_ray.errors import EntryLost, StaleLease
from edit_ray.testing import save_random_wan
from edit_ray.tiers.disk_tier import EntryFolder
from edit_ray.tiers.leases import SegmentLeases
from tests.calls import latents, load
from tests.store_here import StoreHere

SEGMENTS, WINDOW, STEPS = 6, 4, 6
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 3.0}
SAMPLING = SamplingOptions(**CALL)
WARM = {"warm_steps": 3, "inner": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 2, "max_order": 1}
RESIDUAL = 8 * 24 * 4  # [1, 8 tokens, 24] in float32
GRANULARITIES = ("stack", "per_block", 3)
GROUPS_ELSE_SLOW = [*(pytest.param(granularity, marks=pytest.mark.slow) for granularity in GRANULARITIES[:2]), 3]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(save_random_wan(tmp_path_factory.mktemp("model") / "wan", num_layers=6), device="cpu")


def segment_latents(pipe, segment, on_step=None):
    """One segment; its own prompt and noise."""
    prompt = ("a red circle", "a blue square")[segment // 4]
    return latents(pipe, segment, **CALL, prompt=prompt, reset_cache=False, callback_on_step_end=on_step)


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


def through_the_actor(pipe, granularity, folder, store, *, host_entries=2, ahead=True, way="require", kill_in=None):
    """The same as the GPU actor does it, with a CacheStore actor's class, which dies in the midst of `kill_in`."""
    cache = pipe.enable_cache("warmstart_reuse", STEPS, granularity, **WARM)
    host = host_entries * 4096
    options = {"host_bytes": host, "allow_tmpfs": True, "shared_memory": way, "directory": str(folder / "disk")}
    prompts = [{"segment": 0, "prompt": "a red circle"}]
    values = {"store": options, "video": {"num_segments": SEGMENTS}, "prompt_segments": prompts}
    spec = RunSpec("run", folder, Config.model_validate(values))
    reuse = plan_run_reuse(pipe, spec.residuals_id, SEGMENTS, WINDOW, SAMPLING, None)
    assert reuse.form.size == RESIDUAL
    leases = SegmentLeases(store, spec.reusing, reuse)

    def attempt_at(segment, attempt, on_step=None):
        planned = leases.begin(segment, attempt, cache.history_len, then_next=ahead)
        cache.use_store(planned, planned.planned_reads())
        cache.set_generation(segment)
        cache.set_reuse_window({key[0] for key in planned.planned_reads()})
        made = segment_latents(pipe, segment, on_step)
        planned.finish()
        return made, leases.complete(segment, attempt)

    def die(pipe, step, timestep, tensors):
        if step == 0:
            store.kill()
        return {}

    made, peak = [], 0
    for segment in range(SEGMENTS):
        try:
            of_segment, figures = attempt_at(segment, 0, die if segment == kill_in else None)
        except (EntryLost, StaleLease, ConnectionError):
            assert segment == kill_in
            cache = pipe.enable_cache("warmstart_reuse", STEPS, granularity, **WARM)  # an error has taken it away
            of_segment, figures = attempt_at(segment, 1)
            kill_in = None
        made.append(of_segment)
        peak = max(peak, figures["peak_bytes"]["host"])
    assert kill_in is None, "it died and nobody noticed"
    cache.use_store(GPUStore())
    pipe.disable_cache()
    assert peak <= host
    leases.close()
    return torch.cat(made)


@pytest.fixture
def store_here():
    store = StoreHere()
    yield store
    store.close()


@pytest.fixture(scope="module")
def expected(pipe):
    """The latents of each granularity, made when somebody asks for them."""

    class Expected(dict):
        def __missing__(self, granularity):
            self[granularity] = in_process(pipe, granularity, GPUStore())
            return self[granularity]

    return Expected()


@pytest.mark.parametrize("granularity", GROUPS_ELSE_SLOW)
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


@pytest.mark.one_in(3)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "options",
    [{"ahead": True}, {"ahead": False}, {"host_entries": 500}, {"way": "never"}, {"way": "never", "ahead": False}],
    ids=str,
)
def test_through_the_actor(pipe, expected, tmp_path, store_here, granularity, options):
    assert torch.equal(through_the_actor(pipe, granularity, tmp_path, store_here, **options), expected[granularity])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("granularity", GROUPS_ELSE_SLOW)
@pytest.mark.parametrize("kill_in", [0, 2])
@pytest.mark.parametrize("way", ["require", "never"])
def test_a_store_that_dies_in_the_midst_of_a_segment(pipe, expected, tmp_path, store_here, granularity, kill_in, way):
    made = through_the_actor(pipe, granularity, tmp_path, store_here, way=way, kill_in=kill_in)
    assert torch.equal(made, expected[granularity])


@pytest.mark.parametrize("granularity", GROUPS_ELSE_SLOW)
@pytest.mark.parametrize("longest_s", [0.02, pytest.param(0.2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["require", "never"])
def test_random_delays_in_every_transfer(
    pipe, expected, tmp_path, store_here, monkeypatch, granularity, longest_s, way
):
    noise = random.Random(1)

    def delayed(call):
        def later(*arguments):
            time.sleep(noise.random() * longest_s)
            return call(*arguments)

        return later

    for name in ("read", "write"):
        monkeypatch.setattr(EntryFolder, name, delayed(getattr(EntryFolder, name)))
    made = through_the_actor(pipe, granularity, tmp_path, store_here, host_entries=3, way=way)
    assert torch.equal(made, expected[granularity])
