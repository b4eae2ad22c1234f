"""The engine of a GPU actor with a cache: segments are those of the library, each with the cache that it asks for."""

import asyncio
import copy

import pytest
import torch

from edit_ray.actors.local import LocalPool
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.cache.options import CacheOptions
from edit_ray.cache.records import Record
from edit_ray.cli import main
from edit_ray.config import Config
from edit_ray.engine.calibration import FILE_NAME, write_calibration
from edit_ray.engine.loading import load_pipeline
from edit_ray.engine.options import ModelOptions, SamplingOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.errors import RunCancelled
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan

STEPS = 5
SAMPLING = SamplingOptions(height=32, width=32, num_frames=5, num_inference_steps=STEPS, guidance_scale=4.0)
WORDS = {"prompt": "a red circle", "seed": 3}
ALWAYS = CacheOptions(policy="always")
MASKED = CacheOptions(policy="schedule", mask=[True, False, True, False, True])
FITTED = CacheOptions(policy="teacache", coefficients=[1.0, 0.0], rel_l1_thresh=3)
PER_BLOCK = CacheOptions(policy="taylorseer", cache_interval=2, disable_cache_before_step=1, granularity="per_block")
PROBED = CacheOptions(policy="fbcache", rel_l1_thresh=3)
FORECAST = CacheOptions(policy="spectrum", warmup_steps=2, cfg_gate=0.5)
GATED = CacheOptions(policy="always", cfg_gate=0.5)
CACHES = [MASKED, FITTED, PER_BLOCK, PROBED, FORECAST, GATED]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("wan"), expand_timesteps=True, num_layers=3)


@pytest.fixture(scope="module")
def new(folder):
    """Makes engines that have done nothing yet."""
    pipe = load_pipeline(ModelOptions(path=str(folder), device="cpu"))
    return lambda: SegmentEngine(copy.deepcopy(pipe))


@pytest.fixture
def engine(new):
    return new()


@pytest.fixture(scope="module")
def uncached(new):
    engine = new()
    latents = engine.denoise(SAMPLING, **WORDS)
    assert (engine.record, engine.pipe.cache) == (None, None)
    return latents


def test_a_cache_that_never_skips_changes_no_bit(engine, new, uncached):
    assert torch.equal(engine.denoise(SAMPLING, **WORDS, cache=ALWAYS), uncached)
    assert engine.record.mask("cond") == engine.record.mask("uncond") == [True] * STEPS
    history = uncached[:, :, -1:]
    continued = engine.denoise(SAMPLING, **WORDS, history=history, cache=ALWAYS)
    assert torch.equal(continued, new().denoise(SAMPLING, **WORDS, history=history))


def test_each_cache_skips(engine, uncached):
    for cache in CACHES:
        latents = engine.denoise(SAMPLING, **WORDS, cache=cache)
        assert not torch.equal(latents, uncached)
        (count,) = engine.record.counts().values()
        assert count.skipped > 0
        assert engine.record.num_steps == STEPS
        assert engine.record.num_units == (3 if cache is PER_BLOCK else 1)
        assert len(engine.record) == STEPS * 2 * engine.record.num_units


def test_caches_one_after_the_other_give_what_each_gives_alone(new, engine, uncached):
    alone = [new().denoise(SAMPLING, **WORDS, cache=cache) for cache in CACHES]
    for order in (range(len(CACHES)), reversed(range(len(CACHES)))):
        for index in order:
            assert torch.equal(engine.denoise(SAMPLING, **WORDS, cache=CACHES[index]), alone[index])
        assert torch.equal(engine.denoise(SAMPLING, **WORDS), uncached)
        assert engine.record is None


def test_the_segments_of_a_run_share_one_cache_and_no_residual(engine):
    first = engine.denoise(SAMPLING, **WORDS, cache=MASKED)
    cache, record = engine.pipe.cache, engine.record
    engine.denoise(SAMPLING, prompt="a blue square", seed=4, cache=CacheOptions(**MASKED.model_dump()))
    assert engine.pipe.cache is cache
    assert engine.record is not record
    assert engine.record == record, "a known mask is the same for every segment"
    assert torch.equal(engine.denoise(SAMPLING, **WORDS, cache=MASKED), first)


def test_a_cache_is_that_of_the_steps_and_the_shift_it_was_made_for(engine, new):
    for steps in (STEPS, 8, STEPS):
        sampling = SAMPLING.model_copy(update={"num_inference_steps": steps})
        latents = engine.denoise(sampling, **WORDS, cache=FITTED)
        assert engine.record.num_steps == steps
        assert torch.equal(latents, new().denoise(sampling, **WORDS, cache=FITTED))
    targeted = CacheOptions(policy="teacache", coefficients=[1.0, 0.0], target_speedup=2.4)
    thresholds = set()
    for flow_shift in (3.0, 9.0):
        engine.denoise(SAMPLING.model_copy(update={"flow_shift": flow_shift}), **WORDS, cache=targeted)
        assert sum(engine.record.mask()) == 2
        thresholds.add(engine.pipe.cache.policy.rel_l1_thresh)
    assert len(thresholds) == 2, "the steps' timesteps are others, and so is what a threshold makes of them"


def test_a_target_speedup_is_met_with_the_models_own_calibration(folder, engine):
    write_calibration(folder / FILE_NAME, "teacache", {"coefficients": [1.0, 0.0]}, {})
    try:
        engine.denoise(SAMPLING, **WORDS, cache=CacheOptions(policy="teacache", target_speedup=2.4))
    finally:
        (folder / FILE_NAME).unlink()
    assert sum(engine.record.mask("cond")) == sum(engine.record.mask("uncond")) == 2


def test_a_stopped_segment_leaves_the_next_one_as_it_is(engine):
    expected = engine.denoise(SAMPLING, **WORDS, cache=MASKED)

    def stop(done, total):
        if done == 3:
            raise RunCancelled("stopped on request")

    with pytest.raises(RunCancelled):
        engine.denoise(SAMPLING, prompt="a blue square", seed=9, on_step=stop, cache=MASKED)
    assert torch.equal(engine.denoise(SAMPLING, **WORDS, cache=MASKED), expected)


def test_a_cache_that_cannot_be_made_fails_the_segment_and_leaves_the_engine_usable(engine, uncached):
    for cache, words in (
        (CacheOptions(policy="teacache"), "either wan_variant="),
        (CacheOptions(policy="tea"), "no cache policy named 'tea'"),
        (CacheOptions(policy="always", granularity=4), "granularity is 4"),
        (CacheOptions(policy="schedule", mask=[True]), "mask has 1 entries, and the loop has 5 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.denoise(SAMPLING, **WORDS, cache=cache)
        assert torch.equal(engine.denoise(SAMPLING, **WORDS), uncached)


def run_two_segments(root, run_id, folder, cache):
    """A run by the actors' plain classes; the statistics of its segments."""
    config = Config.model_validate(
        {
            "model": {"path": str(folder), "device": "cpu"},
            "sampling": SAMPLING.model_dump(),
            "video": {"num_segments": 2},
            "prompt_segments": [{"segment": 0, "prompt": "a red circle"}],
            "cache": cache,
            "engine": {"cpu_threads": 1, "idle_exit_s": 3600, "segment_retries": 0},
        }
    )

    async def finish():
        scheduler = SegmentSchedulerActor(LocalPool())
        await scheduler.submit(run_id, config.model_dump(mode="json"), str(root), str(root), "")
        while not (reply := await scheduler.wait_segment(run_id, 2, 60)).status.ended:
            pass
        assert reply.status.state == "done", reply.status.error

    asyncio.run(finish())
    return [segment.statistics for segment in RunFolder(root, run_id).read_manifest().segments]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_a_run_keeps_the_record_of_every_segment(folder, tmp_path, capsys):
    mask = [True, False, True, False, False]
    for statistics in run_two_segments(tmp_path, "cached", folder, {"policy": "schedule", "mask": mask}):
        assert (statistics["units_computed"], statistics["units_skipped"]) == (2 * 2, 2 * 3)
    records = [Record.from_json(RunFolder(tmp_path, "cached").record(k).read_text()) for k in (0, 1)]
    assert [record.mask() for record in records] == [mask, mask]
    assert main(["--output", str(tmp_path), "report", "cached"]) == 0
    assert "segment 1" in (tmp_path / "cached" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_a_run_without_a_cache_keeps_no_record(folder, tmp_path):
    for statistics in run_two_segments(tmp_path, "uncached", folder, {"policy": "none"}):
        assert not [name for name in statistics if name.startswith("units")]
    assert list((tmp_path / "uncached" / "records").iterdir()) == []
    assert main(["--output", str(tmp_path), "report", "uncached"]) == 0, "the page of a run has more than decisions"
