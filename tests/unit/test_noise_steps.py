"""The planned steps of a noise scheduler: diffusers' bits, and diffusers' own steps where something has changed."""

import copy
from contextlib import contextmanager

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edit_ray.engine.noise_steps import plan_noise_steps

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy of diffusers' karras sigmas
CPU = torch.device("cpu")
CONFIGS = st.fixed_dictionaries(
    {
        "solver_order": st.integers(1, 3),
        "solver_type": st.sampled_from(["bh1", "bh2"]),
        "lower_order_final": st.booleans(),
        "predict_x0": st.booleans(),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "disable_corrector": st.lists(st.integers(0, 4), max_size=2),
        "kind": st.sampled_from(["flow", "karras flow", "epsilon", "v_prediction", "sample", "karras"]),
        "flow_shift": st.sampled_from([1.0, 3.0, 7.5]),
    }
)


def scheduler_of(config):
    config = dict(config)
    kind = config.pop("kind")
    config |= {"use_karras_sigmas": "karras" in kind, "use_flow_sigmas": "flow" in kind}
    config["prediction_type"] = "flow_prediction" if "flow" in kind else kind if "karras" not in kind else "epsilon"
    return UniPCMultistepScheduler(**config)


@contextmanager
def planned(scheduler, last=None):
    plan = plan_noise_steps(scheduler, CPU, last)
    with plan.installed(scheduler):
        yield plan


def steps_of(scheduler, dtype, seed=0, between=lambda _scheduler, _step: None):
    """The samples after each step of a loop with outputs drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_begin_index(0)
    sample, samples = torch.randn(1, 2, 1, 2, 3, generator=generator), []
    for step, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(sample.shape, generator=generator).to(dtype)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        samples.append(sample)
        between(scheduler, step)
    return samples


def same(ones, others):
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(ones, others, strict=True))


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_planned_steps_are_diffusers_bits(config, num_steps, dtype):
    try:
        stock = scheduler_of(config)
        stock.set_timesteps(num_steps)
        ours = copy.deepcopy(stock)
        wanted = steps_of(stock, dtype)
    except (ValueError, RuntimeError):  # what diffusers refuses, or cannot solve
        assume(False)
    with pytest.MonkeyPatch.context() as patch, planned(ours):
        for name in ("multistep_uni_p_bh_update", "multistep_uni_c_bh_update"):
            patch.setattr(UniPCMultistepScheduler, name, None)  # nothing is left to them
        assert same(steps_of(ours, dtype), wanted)
    assert ours.__dict__.keys() == stock.__dict__.keys()
    ours.set_timesteps(num_steps)
    assert same(steps_of(ours, dtype), wanted), "afterwards it is diffusers' own again"


def wan(**config):
    values = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = UniPCMultistepScheduler(**values | config)
    scheduler.set_timesteps(8)
    return scheduler


CHANGES = {
    "other sigmas": lambda scheduler: setattr(scheduler, "sigmas", scheduler.sigmas * 0.9),
    "sigmas in place": lambda scheduler: scheduler.sigmas.mul_(0.9),
    "another type": lambda scheduler: scheduler.register_to_config(solver_type="bh1"),
    "a lower order": lambda scheduler: setattr(scheduler, "lower_order_nums", 0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_callback_changes_acts_at_the_next_step(change):
    def at_the_third(scheduler, step):
        if step == 2:
            change(scheduler)

    stock, ours = wan(), wan()
    wanted = steps_of(stock, torch.float32, between=at_the_third)
    with planned(ours):
        got = steps_of(ours, torch.float32, between=at_the_third)
    assert same(got, wanted)
    assert not same(got, steps_of(wan(), torch.float32))


def test_a_plan_is_kept_while_the_schedule_is_the_same():
    first = plan_noise_steps(wan(), CPU)
    assert plan_noise_steps(wan(), CPU, first) is first
    assert plan_noise_steps(wan(flow_shift=5.0), CPU, first) is not first
    assert plan_noise_steps(wan(solver_type="bh1"), CPU, first) is not first


class Changed(UniPCMultistepScheduler):
    def multistep_uni_p_bh_update(self, *args, **kwargs):
        return super().multistep_uni_p_bh_update(*args, **kwargs) * 2


def test_other_schedulers_have_no_plan():
    euler, changed, replaced = FlowMatchEulerDiscreteScheduler(), Changed(), wan()
    replaced.multistep_uni_c_bh_update = lambda *args, **kwargs: None
    assert [plan_noise_steps(scheduler, CPU) for scheduler in (euler, changed, replaced)] == [None] * 3
