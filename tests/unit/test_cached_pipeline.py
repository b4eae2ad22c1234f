"""A pipeline with a cache as part of a larger program: other pipelines, copies, other schedulers, other lengths."""

import copy
import pickle
import pydoc
from functools import partial

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline

import edit_ray
import edit_ray.cache
from edit_ray import EditWanPipeline
from edit_ray.cache.policies import POLICIES
from tests.unit import cached
from tests.unit.cached import quiet

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
latents = partial(cached.latents, num_inference_steps=STEPS)


@pytest.mark.parametrize("steps", [2, 4, 5])
def test_a_second_order_noise_scheduler_is_planned_as_its_loop_goes(pipe, steps):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    pipe.enable_cache("taylorseer", steps, cache_interval=2, disable_cache_before_step=1)
    plan = pipe.cache.plan()["transformer", "cond", 0]
    latents(pipe, num_inference_steps=steps)
    assert len(plan) == 2 * steps - 1
    assert list(plan) == pipe.cache.record.mask()
    assert not all(plan)


def test_a_speedup_is_reached_with_a_second_order_noise_scheduler(pipe):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    pipe.enable_cache("magcache", 10, mag_ratios=[1.0, 0.9, 0.99, 0.98], target_speedup=1.5, retention_ratio=0.0)
    latents(pipe, num_inference_steps=10)
    mask = pipe.cache.record.mask()
    assert len(mask) == 19
    assert len(mask) / sum(mask) == pytest.approx(1.5, abs=0.15)


def test_a_cache_follows_calls_of_another_number_of_steps(pipe):
    options = {"cache_interval": 2, "disable_cache_before_step": 1}
    pipe.enable_cache("taylorseer", **options)  # for 50 steps
    made = [latents(pipe, num_inference_steps=steps) for steps in (6, 3, 6)]
    assert len(pipe.cache.record.mask()) == 6
    pipe.disable_cache()
    pipe.enable_cache("taylorseer", 6, **options)
    assert torch.equal(made[0], latents(pipe, num_inference_steps=6))
    assert torch.equal(made[2], made[0])


def test_what_was_stored_at_another_number_of_steps_is_not_reused(pipe):
    pipe.enable_cache("warmstart_reuse", 3, warm_steps=1, inner="always")
    for generation, steps in enumerate((3, 5)):
        pipe.cache.set_generation(generation)
        pipe.cache.set_reuse_window(range(generation))
        latents(pipe, num_inference_steps=steps, reset_cache=False)
    assert pipe.cache.record.mask() == [True] * 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "schedule", "mask": [True, False, True]}, "mask has 3 entries, and the loop has 4 steps"),
        ({"policy": "ranked", "skip_rank": [None, 0, 1]}, "skip_rank has 3 entries, and the loop has 4 steps"),
        (
            {"policy": "magcache", "mag_ratios": [1.0, 0.9, 0.99], "target_speedup": 1.5},
            "target_speedup was reached for a loop of 3 steps, and this one has 4",
        ),
    ],
)
def test_what_was_made_for_one_number_of_steps_refuses_another(pipe, options, said):
    pipe.enable_cache(num_inference_steps=3, **options)
    with pytest.raises(ValueError, match=said):
        latents(pipe)
    assert pipe.cache is not None
    latents(pipe, num_inference_steps=3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_a_cached_pipeline_has_no_cache(pipe, copied):
    kinds = [type(module) for module in pipe.transformer.modules()]
    plain = latents(copied(pipe))  # weights at other addresses may choose other kernels
    pipe.enable_cache("taylorseer", STEPS, cache_interval=2, disable_cache_before_step=1)
    cached = latents(pipe)
    other = copied(pipe)
    assert other.cache is None
    assert [type(module) for module in other.transformer.modules()] == kinds
    assert torch.equal(latents(other), plain)
    other.enable_cache("always", STEPS)
    assert torch.equal(latents(pipe), cached)
    assert pipe.cache.stats["cond"].skipped > 0


def test_other_pipelines_take_a_cached_transformer_with_its_cache(folder):
    pipe = quiet(EditWanPipeline.from_pretrained(folder))
    pipe.enable_cache("taylorseer", STEPS, cache_interval=2, disable_cache_before_step=1)
    stock = quiet(WanPipeline.from_pipe(pipe))  # which also rounds some of the weights that both now share
    ours = latents(pipe)
    assert stock.transformer is pipe.transformer
    assert torch.equal(latents(stock), ours)
    assert WanVideoToVideoPipeline.from_pipe(pipe).transformer is pipe.transformer
    again = EditWanPipeline.from_pipe(pipe)
    assert again.cache is pipe.cache
    again.disable_cache()
    assert pipe.cache is None


def test_a_pipeline_without_transformers_has_nothing_to_cache(pipe):
    empty = EditWanPipeline(**{name: part for name, part in pipe.components.items() if "transformer" not in name})
    with pytest.raises(ValueError, match="There is no transformer to cache"):
        empty.enable_cache("always", STEPS)


def test_a_transformer_compiled_after_it_got_its_cache_is_refused_as_before(pipe):
    plain = pipe.transformer
    for enable_first in (False, True):
        if enable_first:
            pipe.enable_cache("always", STEPS)
        pipe.transformer = torch.compile(plain, backend="eager")
        with pytest.raises(ValueError, match="compiled as a whole"):
            latents(pipe) if enable_first else pipe.enable_cache("always", STEPS)
        pipe.transformer = plain


def test_a_cache_says_what_it_is(pipe):
    cache = pipe.enable_cache("taylorseer", STEPS, cache_interval=2, disable_cache_before_step=1)
    assert "TaylorSeer" in repr(cache)
    assert f"num_steps={STEPS}" in repr(cache)
    latents(pipe)
    counts = cache.stats["cond"]
    assert f"cond {counts.skipped} of {STEPS}" in repr(cache)


def test_help_names_every_policy(pipe):
    text = pydoc.render_doc(pipe.enable_cache)
    own = [name for name in POLICIES.names() if POLICIES.find(name).__module__.startswith("edit_ray.")]
    assert len(own) == 15
    assert [name for name in own if f'"{name}"' not in text] == []


def test_dir_shows_what_is_exported():
    for package in (edit_ray, edit_ray.cache):
        assert dir(package) == sorted(package.__all__)
