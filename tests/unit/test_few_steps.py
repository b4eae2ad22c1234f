"""Few steps in a run: noise levels, samplers, fresh noise, two experts; and what a cache can skip in them."""

import copy

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from edit_ray.cache.policies import make_policy
from edit_ray.cli import main
from edit_ray.cli.reuse_estimate import what_can_be_skipped
from edit_ray.config import dump_yaml
from edit_ray.engine.continuity import load_latents
from edit_ray.engine.loading import load_pipeline, noise_scheduler_for
from edit_ray.engine.options import ModelOptions, SamplingOptions
from edit_ray.engine.segment import SegmentEngine
from edit_ray.errors import ModelError
from edit_ray.runs.folder import RunFolder
from edit_ray.testing import save_random_wan
from tests.chaos.storm import die
from tests.runs_here import Dying, check_same, config_for, done, made, submit
from tests.unit.policy_unit import RecordedSignals, Unit

pytestmark = pytest.mark.usefixtures("one_thread")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
OF_DIFFUSERS = {
    "unipc": UniPCMultistepScheduler(**FLOW),
    "euler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    "dpm++": DPMSolverMultistepScheduler(**FLOW),
    "renoise": FlowMatchLCMScheduler(shift=5.0),
}
FOUR = [1.0, 0.75, 0.5, 0.25]
SIZE = {"height": 32, "width": 32, "num_frames": 9}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = save_random_wan(tmp_path_factory.mktemp("experts"), two_experts=True, boundary_ratio=0.9)
    return load_pipeline(ModelOptions(path=str(folder), device="cpu"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # DPMSolverMultistepScheduler's
@pytest.mark.parametrize("sampler", OF_DIFFUSERS)
@pytest.mark.parametrize("sigmas", [None, FOUR], ids=["steps", "sigmas"])
def test_a_segment_is_that_of_diffusers_noise_scheduler(experts, sampler, sigmas):
    given = {"sigmas": sigmas} if sigmas else {"num_inference_steps": 4}
    guidance = {"guidance_scale": 3.0, "guidance_scale_2": 2.0}
    sampling = SamplingOptions(**SIZE, **given, **guidance, sampler=sampler, flow_shift=5.0, boundary_ratio=0.8)
    engine = SegmentEngine(copy.deepcopy(experts))
    if (sampler, sigmas) == ("dpm++", FOUR):
        with pytest.raises(ModelError, match="DPMSolverMultistepScheduler, takes no noise levels"):
            engine.denoise(sampling, prompt="a red circle", seed=3)
        return
    seen = engine.denoise(sampling, prompt="a red circle", seed=3)
    plain = copy.deepcopy(experts)
    plain.scheduler = copy.deepcopy(OF_DIFFUSERS[sampler])
    plain.register_to_config(boundary_ratio=0.8)
    generator = torch.Generator().manual_seed(3)
    call = {**SIZE, **given, **guidance, "generator": generator, "output_type": "latent"}
    assert torch.equal(seen, plain("a red circle", "", **call).frames)
    again = engine.denoise(SamplingOptions(**SIZE, num_inference_steps=4), prompt="a red circle", seed=3)
    untouched = SegmentEngine(copy.deepcopy(experts))
    expected = untouched.denoise(SamplingOptions(**SIZE, num_inference_steps=4), prompt="a red circle", seed=3)
    assert torch.equal(again, expected), "the model's own again"
    assert not torch.equal(seen, again)


def test_the_models_own_noise_scheduler_stays_where_it_is_the_sampler(experts):
    own = experts.scheduler
    assert noise_scheduler_for(own, SamplingOptions(sampler="unipc", flow_shift=3.0)) is own
    assert noise_scheduler_for(own, SamplingOptions(flow_shift=3.0)) is own


RENOISE = {"sampling": {"sigmas": FOUR, "num_inference_steps": 4, "sampler": "renoise", "guidance_scale": 1.0}}


@pytest.mark.parametrize("calls", [2, pytest.param(5, marks=pytest.mark.slow), 7])
async def test_fresh_noise_is_the_same_after_a_resume(start, tmp_path, model, calls):
    for name in ("whole", "hurt"):
        (tmp_path / name).mkdir()
    config = config_for(model, **RENOISE)
    whole = await made(start(), tmp_path / "whole", "one", config)
    first = start(pool := Dying(calls))
    await submit(first, tmp_path / "hurt", "one", config)
    await pool.now.wait()
    await die(first)
    second = start(pool)
    await second.resume("one", str(tmp_path / "hurt"), False)
    await done(second, "one")
    hurt = RunFolder(tmp_path / "hurt", "one")
    assert hurt.read_manifest().incarnation == 2
    check_same(hurt, whole)
    noises = [load_latents(whole.latents(index))[:, :, -1:] for index in range(2)]
    assert not torch.equal(*noises)


# What a cache can skip.

POLICIES = {
    "always": {},
    "teacache": {"coefficients": [0.0]},
    "fbcache": {"rel_l1_thresh": 1e9},
    "magcache": {"mag_ratios": [1.0, 0.98, 0.97, 1.01], "threshold": 1e9},
    "dicache": {"rel_l1_thresh": 1e9},
    "taylorseer": {},
    "spectrum": {},
    "dmd": {},
    "foca": {},
    "easycache": {"thresh": 1e9},
    "seacache": {"threshold": 1e9},
}
REUSED_MORE_OFTEN = {
    "spectrum": {"warmup_steps": 1, "flex_window": 3.0},
    "dmd": {"cache_interval": 3, "disable_cache_before_step": 5},
    "foca": {"cache_interval": 2},
    "easycache": {"ret_steps": 0},
    "magcache": {"max_skip_steps": 3, "retention_ratio": 0.0},
    "seacache": {"retention_steps": 2},
}


@given(name=st.sampled_from(list(POLICIES)), num_steps=st.integers(1, 40), seed=st.integers(0, 99), other=st.booleans())
def test_no_policy_skips_more_than_it_says(name, num_steps, seed, other):
    policy = make_policy(name, POLICIES[name] | (REUSED_MORE_OFTEN.get(name, {}) if other else {}))
    unit, generator, skipped = Unit(policy, num_steps), torch.Generator().manual_seed(seed), 0

    def drawn():
        return torch.rand(1, 3, 2, generator=generator)

    for step in range(num_steps):
        signals = RecordedSignals(
            drawn(), drawn(), torch.rand(1, 2, 2, 4, 4, generator=generator), 1 - step / num_steps
        )
        done = unit.step(step, signals=signals, hidden=drawn(), probe=drawn(), output=drawn())
        skipped += not done.computed
    assert skipped == policy.most_skips(num_steps), "nothing here is too different to be reused"


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({"policy": "none"}, None),
        ({"policy": "teacache", "wan_variant": "t2v-1.3B"}, "4 a segment, of which teacache can skip 2 at most"),
        (
            {"policy": "teacache", "wan_variant": "t2v-1.3B", "use_ret_steps": True},
            "4 a segment, of which teacache can skip none; cache.policy none computes the same",
        ),
        (
            {"policy": "schedule", "mask": [True, False, True, False]},
            "4 a segment, of which schedule can skip 2 at most",
        ),
        (
            {"policy": "lemica", "reuse_error": [[0.1, 0.2], [0.1], [], []], "skips": 9},
            "4 a segment, of which lemica can skip 2 at most",
        ),
        ({"policy": "ranked", "skip_rank": [None, 0, 2, 1], "skips": 2}, "of which ranked can skip 2 at most"),
        (
            {"policy": "warmstart_reuse", "warm_steps": 1, "reuse_window": 1, "inner": "fbcache"},
            "of which warmstart_reuse can skip 3 at most",
        ),
    ],
)
def test_it_is_said_before_the_run(model, tmp_path, capsys, cache, said):
    config = config_for(model, **RENOISE, cache=cache)
    found = what_can_be_skipped(config)
    assert found is None if said is None else said in found
    if said:
        (tmp_path / "run.yaml").write_text(dump_yaml(config))
        assert main(["plan", "--config", str(tmp_path / "run.yaml")]) == 0
        assert f"\nsteps     {found}\n" in capsys.readouterr().out
