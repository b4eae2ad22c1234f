"""Policies that decide by timesteps alone, against their published rules."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheHook, TaylorSeerState
from hypothesis import given, settings
from hypothesis import strategies as st

import edit_ray
from edit_ray.cache.policies import MagCache, Schedule, TaylorSeer, TeaCache
from edit_ray.cache.policies.estimates import accumulate, extrapolate, forecast
from edit_ray.cache.policies.teacache import WAN_COEFFICIENTS
from tests.unit.policy_unit import RecordedSignals, Unit

TINY_WAN = Path(edit_ray.__file__).parent / "assets" / "tiny_wan"
SETS = [(variant, ret) for variant in WAN_COEFFICIENTS for ret in (True, False)]


class OfficialTeaCache:
    """`teacache_generate.py` in words of one forward: cond and uncond take turns, `cnt` counts both."""

    def __init__(self, coefficients, thresh, sample_steps, use_ret_steps):
        self.rescale, self.thresh = np.poly1d(coefficients), thresh
        self.first = 5 * 2 if use_ret_steps else 1 * 2
        self.cutoff = sample_steps * 2 if use_ret_steps else sample_steps * 2 - 2
        self.cnt, self.accumulated, self.previous = 0, [0.0, 0.0], [None, None]

    def computes(self, modulated):
        turn = self.cnt % 2
        if self.cnt < self.first or self.cnt >= self.cutoff:
            should_calc = True
            self.accumulated[turn] = 0
        else:
            previous = self.previous[turn]
            distance = ((modulated - previous).abs().mean() / previous.abs().mean()).cpu().item()
            self.accumulated[turn] += self.rescale(distance)
            should_calc = not self.accumulated[turn] < self.thresh
            if should_calc:
                self.accumulated[turn] = 0
        self.previous[turn] = modulated.clone()
        self.cnt += 1
        return should_calc


def official_masks(signals, coefficients, thresh, use_ret_steps):
    official = OfficialTeaCache(coefficients, thresh, len(signals), use_ret_steps)
    masks = [], []
    for signal in signals:
        for mask in masks:
            mask.append(official.computes(signal.e0 if use_ret_steps else signal.e))
    return masks


@pytest.fixture(scope="module")
def recorded():
    """What the embedded model's timestep embedder gives at the steps of its noise scheduler, by number of steps."""
    model = WanTransformer3DModel.from_pretrained(TINY_WAN, subfolder="transformer").condition_embedder
    signals = {}
    for num_steps in (20, 30, 50):
        scheduler = UniPCMultistepScheduler.from_pretrained(TINY_WAN, subfolder="scheduler", flow_shift=3.0)
        scheduler.set_timesteps(num_steps)
        with torch.no_grad():
            each = [model.time_embedder(model.timesteps_proj(t.reshape(1))) for t in scheduler.timesteps]
            signals[num_steps] = [
                RecordedSignals(e, model.time_proj(model.act_fn(e)).unflatten(1, (6, -1))) for e in each
            ]
    return signals


@pytest.mark.parametrize("num_steps", [20, 30, 50])
@pytest.mark.parametrize(("variant", "use_ret_steps"), SETS)
def test_teacache_masks_are_the_official_ones(recorded, variant, use_ret_steps, num_steps):
    signals = recorded[num_steps]
    coefficients = WAN_COEFFICIENTS[variant][0 if use_ret_steps else 1]
    rates = set()
    for thresh in (0.01, 0.05, 0.1, 0.2, 0.3, 1.0):
        cond, uncond = official_masks(signals, coefficients, thresh, use_ret_steps)
        policy = TeaCache(wan_variant=variant, rel_l1_thresh=thresh, use_ret_steps=use_ret_steps)
        assert Unit(policy, num_steps).mask(signals) == cond
        assert Unit(policy, num_steps, branch="uncond").mask(signals) == uncond
        rates.add(sum(cond))
    assert min(rates) < num_steps, "without a skip this shows little"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    which=st.sampled_from(SETS),
    num_steps=st.integers(1, 40),
    thresh=st.floats(1e-4, 20),
    drift=st.floats(1e-3, 0.5),
)
def test_teacache_masks_are_the_official_ones_on_random_signals(seed, which, num_steps, thresh, drift):
    random = torch.Generator().manual_seed(seed)
    e, e0 = torch.randn(1, 8, generator=random), torch.randn(1, 6, 8, generator=random)
    signals = []
    for _ in range(num_steps):
        e = e + drift * torch.randn(1, 8, generator=random)
        e0 = e0 + drift * torch.randn(1, 6, 8, generator=random)
        signals.append(RecordedSignals(e, e0))
    variant, ret = which
    cond, uncond = official_masks(signals, WAN_COEFFICIENTS[variant][0 if ret else 1], thresh, ret)
    assert cond == uncond
    assert Unit(TeaCache(wan_variant=variant, rel_l1_thresh=thresh, use_ret_steps=ret), num_steps).mask(signals) == cond


@pytest.mark.parametrize(("change", "threshold"), [(-5.0, 0.0), (-5.0, -1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_accumulation_computes_at_no_threshold_and_at_what_is_no_number(change, threshold):
    unit = Unit(TeaCache(coefficients=[1.0]), 2)
    ctx = unit.step(0, signals=RecordedSignals(e=torch.ones(1, 2))).ctx
    assert accumulate(ctx, change, threshold) is True


def test_teacache_notes_what_it_compared(recorded):
    unit = Unit(TeaCache(wan_variant="t2v-1.3B", rel_l1_thresh=0.2), 20)
    done = [unit.step(step, signals=signals) for step, signals in enumerate(recorded[20])]
    assert {d.ctx.threshold for d in done} == {0.2}
    assert done[0].ctx.signal is None
    for before, now in zip(recorded[20], done[1:], strict=False):
        signal = now.ctx.signals.e
        assert now.ctx.signal == ((signal - before.e).abs().mean() / before.e.abs().mean()).item()
    for now in done[1:-1]:
        assert now.computed is (now.ctx.accumulated >= 0.2)


def test_a_warm_step_is_to_teacache_as_if_it_had_been_computed(recorded):
    signals = recorded[30]
    policy = TeaCache(coefficients=[1.0, 0.0], rel_l1_thresh=10.0)
    cold, warmed = Unit(policy, 30), Unit(policy, 30)
    for step in (0, 1):
        ctx = cold.step(step, signals=signals[step]).ctx
        warmed.state.computed_steps.append(step)
        warmed.policy.warm(ctx.__class__(**{**vars(ctx), "state": warmed.state}))
    later, earlier = (unit.step(2, signals=signals[2]).ctx for unit in (warmed, cold))
    assert later.signal == earlier.signal == later.accumulated
    assert earlier.accumulated == ctx.accumulated + later.accumulated > later.accumulated


def test_teacache_takes_coefficients_per_branch_and_expert(recorded):
    """A polynomial that is the constant c skips floor(0.95 / c) steps in a row below a threshold of 1."""
    policy = TeaCache(
        rel_l1_thresh=1.0, coefficients={"cond": [0.4], "uncond": [0.6], "transformer_2/cond": torch.tensor([2.0])}
    )
    signals = recorded[20]
    assert Unit(policy, 20).mask(signals)[:8] == [True, False, False, True, False, False, True, False]
    assert Unit(policy, 20, branch="uncond").mask(signals)[:6] == [True, False, True, False, True, False]
    assert all(Unit(policy, 20, expert="transformer_2").mask(signals))


def test_a_second_expert_computes_its_first_step(recorded):
    policy = TeaCache(rel_l1_thresh=1.0, coefficients=[0.1])
    unit = Unit(policy, 20, expert="transformer_2")
    assert [unit.step(s, signals=recorded[20][s]).computed for s in (10, 11, 12)] == [True, False, False]


# MagCache


def official_magcache(ratios, num_steps, threshold, max_skip_steps, retention_ratio):
    """The decisions of diffusers' head hook, with its interpolation and in its float32."""
    config = MagCacheConfig(
        mag_ratios=list(ratios),
        num_inference_steps=num_steps,
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        retention_ratio=retention_ratio,
    )
    ratio, error, steps, mask = 1.0, 0.0, 0, []
    for step in range(num_steps):
        compute = True
        if step >= int(retention_ratio * num_steps + 0.5):
            ratio = ratio * config.mag_ratios[step]
            steps += 1
            error = error + abs(1.0 - ratio)
            compute = not (step > 0 and error <= threshold and steps <= max_skip_steps)
            if compute:
                ratio, error, steps = 1.0, 0.0, 0
        mask.append(bool(compute))
    return mask


@settings(max_examples=200, deadline=None)
@given(
    ratios=st.lists(st.one_of(st.floats(0.5, 1.5), st.sampled_from([0.88, 0.9, 0.94, 0.98, 1.0])), min_size=1),
    num_steps=st.integers(1, 60),
    threshold=st.one_of(st.floats(1e-3, 1), st.sampled_from([0.02, 0.06, 0.12])),
    max_skip_steps=st.integers(0, 5),
    retention_ratio=st.floats(0, 1),
)
def test_magcache_decides_as_diffusers(ratios, num_steps, threshold, max_skip_steps, retention_ratio):
    options = {"threshold": threshold, "max_skip_steps": max_skip_steps, "retention_ratio": retention_ratio}
    policy = MagCache(mag_ratios=ratios, **options)
    assert Unit(policy, num_steps).mask() == official_magcache(ratios, num_steps, **options)


def test_a_second_expert_goes_on_with_the_ratios_of_its_steps():
    """diffusers counts a transformer's own steps, so that a second expert begins at the first ratio again."""
    ratios = [1.0] * 5 + [0.5] + [0.99] * 4
    second = Unit(MagCache(mag_ratios=ratios, retention_ratio=0), 10, expert="transformer_2")
    assert [second.step(step).computed for step in (5, 6, 7, 8, 9)] == [True, False, False, True, False]
    assert second.step(6).ctx.signal == pytest.approx(0.99)


# TaylorSeer


@settings(max_examples=100, deadline=None)
@given(
    cache_interval=st.integers(1, 8),
    disable_cache_before_step=st.integers(0, 10),
    disable_cache_after_step=st.none() | st.integers(0, 30),
    max_order=st.integers(0, 4),
    num_steps=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_taylorseer_computes_and_forecasts_as_diffusers(
    cache_interval, disable_cache_before_step, disable_cache_after_step, max_order, num_steps, seed
):
    manager = StateManager(TaylorSeerState, (torch.float32, max_order))
    manager.set_context(CacheContext("cond"))
    theirs = TaylorSeerCacheHook(
        cache_interval, disable_cache_before_step, torch.float32, manager, disable_cache_after_step
    )
    policy = TaylorSeer(
        cache_interval=cache_interval,
        disable_cache_before_step=disable_cache_before_step,
        disable_cache_after_step=disable_cache_after_step,
        max_order=max_order,
    )
    random, ours = torch.Generator().manual_seed(seed), Unit(policy, num_steps)
    for step in range(num_steps):
        hidden, residual = torch.randn(2, 1, 3, 4, generator=random)
        residual = (hidden + residual) - hidden  # what a unit's output less its input comes to
        compute, state = theirs._measure_should_compute()
        done = ours.step(step, hidden=hidden, output=hidden + residual)
        assert done.computed is (compute or step == 0)
        if done.computed:
            state.update((done.output - hidden,))
        else:
            assert torch.equal(done.output, hidden + state.predict()[0])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1), st.lists(st.integers(1, 4), min_size=4, max_size=4), st.integers(1, 5), st.data())
def test_predictions_of_order_one_are_exact_on_a_line(order, gaps, ahead, data):
    slope = data.draw(st.integers(-4, 4))
    steps = [sum(gaps[:count]) for count in range(1, 5)]
    history = [(step, torch.full((2,), 3.0 + slope * step)) for step in reversed(steps)]
    at = steps[-1] + ahead
    expected = 3.0 + slope * (at if order else steps[-1])
    for predict in (forecast, extrapolate):
        assert predict(history, at, order).tolist() == pytest.approx([expected] * 2, abs=1e-4)


def test_a_forecast_keeps_the_dtype_and_is_made_in_float32():
    values = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    history = [(3, values[1:]), (2, values[:1])]
    for predict in (forecast, extrapolate):
        assert predict(history, 5, 1).dtype == torch.bfloat16
        assert predict(history, 5, 1).item() == torch.tensor(1.0234375).bfloat16().item()


@pytest.mark.parametrize("lost", [3, 4])
def test_a_lost_residual_makes_the_unit_compute(lost):
    unit = Unit(TaylorSeer(disable_cache_before_step=3, cache_interval=4, max_order=1), 8)
    assert unit.mask() == [True, True, True, False, True, False, False, False]
    unit = Unit(unit.policy, 8)
    for step in range(5):
        unit.step(step, force=True)
    unit.lose(lost)
    assert unit.step(5).computed


def test_a_second_expert_has_nothing_to_forecast_from_at_first():
    unit = Unit(TaylorSeer(), 20, expert="transformer_2")
    assert [unit.step(step).computed for step in (10, 11, 12)] == [True, False, False]


# schedule


@given(st.data())
def test_a_schedule_computes_where_its_mask_says(data):
    masks = st.lists(st.booleans(), min_size=8, max_size=8)
    cond, uncond = ([True, *data.draw(masks)] for _ in range(2))
    policy = Schedule(mask={"cond": cond, "uncond": np.array(uncond), "transformer_2/uncond": [1] * 9})
    assert Unit(policy, 9).mask() == Unit(policy, 9, expert="transformer_2").mask() == cond
    assert Unit(policy, 9, branch="uncond").mask() == uncond
    assert Unit(policy, 9, branch="uncond", expert="transformer_2").mask() == [True] * 9


def test_a_schedule_extrapolates_over_computed_steps():
    unit = Unit(Schedule(mask=[1, 0, 1, 0, 0], forecast="linear"), 5)
    hidden = torch.tensor([[[10.0]]])
    outputs = [unit.step(step, hidden=hidden, output=hidden + 2**step).output.item() for step in range(5)]
    assert outputs == [11, 11, 14, 14 + 1.5, 14 + 3]
    assert Schedule(mask=[True]).history_len == 1
    assert Schedule(mask=[True], forecast="linear").history_len == 2
