"""Policies that look at tensors in the loop, against their published rules on random tensors."""

from collections import Counter

import pytest
import torch
from diffusers.hooks.sea_cache import (
    SeaCacheConfig,
    SeaCacheContextState,
    SeaCacheSharedState,
    _apply_sea_filter,
    _build_indicator,
    _SeaCacheForwardMetadata,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.policies import DiCache, FirstBlockCache, SeaCache
from edit_ray.cache.policies.dicache import alignment
from edit_ray.cache.policies.seacache import wiener_filter
from edit_ray.testing import save_random_wan
from tests.calls import cached, latents, load
from tests.unit.policy_unit import RecordedSignals, Unit

SEEDS = st.integers(0, 2**32)

pytestmark = pytest.mark.usefixtures("one_thread")


def walk(count, shape, drift, seed):
    """Tensors that move on a little from each to the next."""
    random = torch.Generator().manual_seed(seed)
    at = torch.randn(shape, generator=random)
    for _ in range(count):
        yield at
        at = at + drift * torch.randn(shape, generator=random)


# First-Block-Cache


def test_fbcache_compares_with_the_last_computed_step_also_if_that_was_forced():
    hidden, unit = torch.zeros(1, 1, 1), Unit(FirstBlockCache(rel_l1_thresh=0.1), 8)
    probes = [torch.full((1, 1, 1), value) for value in (1.0, 1.09, 1.18, 1.18, 1.27)]
    done = [
        unit.step(step, hidden=hidden, probe=probe, force=True if step == 2 else None)
        for step, probe in enumerate(probes)
    ]
    assert [d.computed for d in done] == [True, False, True, False, False]
    assert done[3].ctx.signal == 0
    assert done[4].ctx.signal == pytest.approx(0.09 / 1.18)


def test_fbcache_computes_at_the_second_look_of_a_warm_step_only_if_the_first_block_moved():
    """A warm step is no computed one: the reference stays."""
    unit = Unit(FirstBlockCache(rel_l1_thresh=0.1), 8)
    ctx = unit.step(0, probe=torch.ones(1, 1, 1)).ctx
    reference = unit.state.user["reference"]
    ctx.first_block_residual = torch.zeros(1, 1, 1)
    unit.policy.warm(ctx)
    assert unit.state.user["reference"] is reference


def test_a_first_block_that_adds_nothing_computes():
    """0 / 0 is no distance."""
    unit = Unit(FirstBlockCache(rel_l1_thresh=0.1), 3)
    assert [unit.step(step, probe=torch.zeros(1, 1, 1)).computed for step in range(3)] == [True] * 3


# SeaCache


def sea_signals(num_steps, batch, drift, seed):
    """Latents [B, C, T, h, w] on their way from noise to video."""
    for step, clean in enumerate(walk(num_steps, (batch, 3, 2, 4, 5), drift, seed)):
        sigma = 1 - step / num_steps
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        yield RecordedSignals(latents=(1 - sigma) * clean + sigma * noise, sigma=sigma)


class OfficialSeaCache:
    """diffusers' own gate; its linear extrapolation written out."""

    def __init__(self, **options):
        self.config, self.shared, self.state = SeaCacheConfig(**options), SeaCacheSharedState(), SeaCacheContextState()

    def step(self, step, num_steps, signals, hidden, output):
        metadata = _SeaCacheForwardMetadata(step, signals.sigma, num_steps, list(signals.latents.unbind(0)))
        indicator = _build_indicator(self.config, metadata)
        if self.shared.resolve_gate(self.state, metadata, indicator, self.config):
            self.state.consecutive_cached = 0
            self.state.history = [*self.state.history, (step, output - hidden)][-2:]
            return True, output
        self.state.consecutive_cached += 1
        latest, residual = self.state.history[-1]
        if self.config.residual_order == 1 and len(self.state.history) == 2:
            previous, before = self.state.history[0]
            residual = residual + (residual - before) * ((step - latest) / (latest - previous))
        return False, hidden + residual


@settings(max_examples=80, deadline=None)
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    drift=st.floats(0.01, 0.5),
    threshold=st.floats(0.02, 1.5),
    residual_order=st.integers(0, 1),
    retention_steps=st.integers(0, 3),
    cache_end_steps=st.integers(0, 3),
    max_consecutive_cached=st.integers(0, 4),
    power_exp=st.floats(0.5, 4),
)
def test_seacache_decides_and_extrapolates_as_diffusers(seed, batch, drift, **options):
    ours, theirs, num_steps = Unit(SeaCache(**options), 14), OfficialSeaCache(**options), 14
    random = torch.Generator().manual_seed(seed)
    for step, signals in enumerate(sea_signals(num_steps, batch, drift, seed)):
        hidden, output = torch.randn(2, batch, 5, 4, generator=random)
        done = ours.step(step, signals=signals, hidden=hidden, output=output)
        compute, expected = theirs.step(step, num_steps, signals, hidden, output)
        assert done.computed is compute
        assert torch.equal(done.output, expected)
        if done.ctx.accumulated is not None and not compute:
            assert done.ctx.accumulated == pytest.approx(theirs.state.accumulated_distance, rel=1e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 1), st.floats(0.1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_filter_is_diffusers_for_each_video_of_a_batch(seed, sigma, power_exp, dtype):
    latents = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ours = wiener_filter(latents, sigma, power_exp)
    assert ours.dtype == dtype
    for mine, video in zip(ours, latents, strict=True):
        theirs = _apply_sea_filter(video.movedim(0, -1), sigma, power_exp).movedim(-1, 0)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_units_of_one_forward_share_its_filtered_latents():
    policy, num_steps = SeaCache(threshold=0.2), 10
    first, second = Unit(policy, num_steps), Unit(policy, num_steps)
    for step, signals in enumerate(sea_signals(num_steps, 1, 0.1, seed=3)):
        done = [unit.step(step, signals=signals) for unit in (first, second)]
        assert first.state.user["previous"] is second.state.user["previous"]
        assert done[0].computed is done[1].computed
        assert done[0].ctx.signal == done[1].ctx.signal
    assert 0 < len(first.state.computed_steps) < num_steps


def test_a_forced_step_begins_the_count_of_seacache_anew():
    policy = SeaCache(threshold=1000.0, max_consecutive_cached=2, cache_end_steps=0)
    signals = list(sea_signals(9, 1, 0.1, seed=1))
    free, forced = Unit(policy, 9), Unit(policy, 9)
    assert [free.step(s, signals=signals[s]).computed for s in range(9)] == [s % 3 == 0 for s in range(9)]
    done = [forced.step(s, signals=signals[s], force=True if s == 2 else None) for s in range(9)]
    assert [d.computed for d in done] == [s in (0, 2, 5, 8) for s in range(9)]
    assert done[3].ctx.accumulated == done[3].ctx.signal


def test_a_warm_step_is_to_seacache_as_if_it_had_been_computed():
    policy, signals = SeaCache(threshold=1000.0), list(sea_signals(4, 1, 0.1, seed=1))
    unit = Unit(policy, 9)
    unit.step(0, signals=signals[0])
    ctx = unit.step(1, signals=signals[1]).ctx
    policy.warm(ctx)
    after = unit.step(2, signals=signals[2]).ctx
    assert after.accumulated == after.signal


@pytest.mark.parametrize(
    ("signals", "sentence"),
    [
        (RecordedSignals(latents=torch.zeros(1, 1, 1, 1, 1)), r"step 3 lacks sigma, which .* cache_context\(sigma=…\)"),
        (RecordedSignals(sigma=0.5), "step 3 lacks its latents"),
        (RecordedSignals(latents=torch.zeros(1, 1, 1, 1, 1), sigma=14.6), "from 0 to 1, and got 14.6"),
    ],
)
def test_seacache_says_what_it_lacks(signals, sentence):
    with pytest.raises(ValueError, match=sentence):
        Unit(SeaCache(), 10).step(3, signals=signals)


# DiCache


class OfficialDiCache:
    """The authors' forward for Wan2.1, one branch of it: whole residuals, `cnt` counts the forwards of that branch."""

    def __init__(self, num_steps, rel_l1_thresh, ret_ratio):
        self.num_steps, self.rel_l1_thresh, self.ret_ratio = num_steps, rel_l1_thresh, ret_ratio
        self.cnt, self.accumulated = 0, 0.0
        self.previous_internal_states, self.residual_cache = None, None
        self.residual_window, self.probe_residual_window = [], []

    def step(self, x, test_x, output):
        skip_forward = False
        if self.cnt >= int(self.num_steps * self.ret_ratio):
            previous = self.previous_internal_states
            self.accumulated += ((test_x - previous).abs().mean() / previous.abs().mean()).item()
            skip_forward = self.accumulated < self.rel_l1_thresh
            if not skip_forward:
                self.accumulated = 0
        self.cnt += 1
        self.previous_internal_states = test_x
        if skip_forward:
            if len(self.residual_window) >= 2:
                way = self.probe_residual_window[-1] - self.probe_residual_window[-2]
                gone = (test_x - x) - self.probe_residual_window[-2]
                gamma = (gone.abs().mean() / way.abs().mean()).clip(1, 2)
                step = self.residual_window[-1] - self.residual_window[-2]
                return False, x + (self.residual_window[-2] + gamma * step)
            return False, x + self.residual_cache
        self.residual_cache = output - x
        self.residual_window.append(output - x)
        self.probe_residual_window.append(test_x - x)
        return True, output


@settings(max_examples=80, deadline=None)
@given(seed=SEEDS, thresh=st.floats(0.01, 1), drift=st.floats(0.01, 0.3), ratio=st.sampled_from([0.1, 0.2, 0.5]))
def test_dicache_decides_and_aligns_as_the_authors(seed, thresh, drift, ratio):
    num_steps = 15
    ours = Unit(DiCache(rel_l1_thresh=thresh, retention_ratio=ratio), num_steps)
    theirs = OfficialDiCache(num_steps, thresh, ratio)
    for step, (hidden, added, rest) in enumerate(walk(num_steps, (3, 2, 5, 4), drift, seed)):
        probe = hidden + added
        done = ours.step(step, hidden=hidden, probe=probe, output=probe + rest)
        compute, output = theirs.step(hidden, probe, probe + rest)
        assert done.computed is compute
        assert (done.output - output).abs().max() <= 1e-5 * output.abs().max()


def test_the_alignment_goes_from_1_to_2():
    latest, before = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
    assert [alignment(torch.full((2,), at), latest, before).item() for at in (1.2, 2.0, 2.5, 9.0)] == [1, 1, 1.5, 2]
    assert alignment(before, before, before).item() == 1
    assert alignment(latest.bfloat16(), latest.bfloat16(), before.bfloat16()).dtype == torch.float32


def test_dicache_on_identical_input_gives_the_same_output_again():
    """Also where the probe has not moved between the two computed steps, so that there is no way to go on."""
    hidden, probe, output = torch.randn(3, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    unit = Unit(DiCache(retention_ratio=0.2), 10)
    done = [unit.step(step, hidden=hidden, probe=probe, output=output) for step in range(10)]
    assert [d.computed for d in done] == [True, True] + [False] * 8
    for d in done:
        assert (d.output - output).abs().max() <= 1e-5 * output.abs().max()


def test_dicache_keeps_the_probes_of_two_steps_and_computes_when_a_residual_is_lost():
    unit = Unit(DiCache(rel_l1_thresh=1000.0, retention_ratio=0.5), 10)
    steps = walk(10, (3, 1, 2, 2), 0.1, seed=0)
    for step, (hidden, probe, output) in enumerate(steps):
        if step == 7:
            unit.lose(3)
        done = unit.step(step, hidden=hidden, probe=probe, output=output)
        assert done.computed is (step < 5 or step == 7)
        assert sorted(unit.state.user["probes"]) == unit.state.computed_steps[-2:]


def test_a_forced_step_begins_the_count_of_dicache_anew():
    unit = Unit(DiCache(rel_l1_thresh=1000.0, retention_ratio=0), 10)
    for step, (hidden, probe) in enumerate(walk(5, (2, 1, 2, 2), 0.1, seed=0)):
        ctx = unit.step(step, hidden=hidden, probe=probe, force=True if step == 3 else None).ctx
        assert step == 0 or (ctx.accumulated == ctx.signal) is (step in (1, 4))
    unit.policy.warm(ctx)
    assert unit.state.user["accumulated"] == 0


# What states hold


KEEPING = {
    "fbcache": {"rel_l1_thresh": 0.05},
    "dicache": {"rel_l1_thresh": 0.05},
    "seacache": {"threshold": 0.05},
    "easycache": {"thresh": 1e9, "ret_steps": 2},
    "taylorseer": {"cache_interval": 2},
    "dmd": {"cache_interval": 2},
    "spectrum": {},
    "warmstart_reuse": {"inner": "dicache", "rel_l1_thresh": 0.05, "warm_steps": 1},
}


@pytest.mark.parametrize("granularity", ["stack", 2])
@pytest.mark.parametrize("policy", KEEPING)
def test_a_policy_keeps_as_many_tensors_as_it_says(tmp_path, policy, granularity):
    """Read out of the states of its units after every step."""
    pipe, most = load(save_random_wan(tmp_path / "wan", num_layers=4), device="cpu"), Counter()

    def count(pipe, step, timestep, tensors):
        for (_, branch, unit), state in pipe.cache._states.items():
            kept = {tensor.untyped_storage()._cdata: tensor for tensor in held(state.user)}
            for dim, kind in ((3, "hidden"), (5, "latents")):
                number = sum(tensor.dim() == dim for tensor in kept.values())
                most[branch, unit, kind] = max(most[branch, unit, kind], number)
        return {}

    with cached(pipe, policy, 12, granularity=granularity, **KEEPING[policy]) as cache:
        latents(pipe, num_inference_steps=12, callback_on_step_end=count)
        branches = ["cond"] if cache.policy.uncond_follows else ["cond", "uncond"]
        for unit in range(1 if granularity == "stack" else 2):
            for branch in branches:
                assert most[branch, unit, "hidden"] == cache.policy.kept_hidden
                assert most[branch, unit, "latents"] == cache.policy.kept_latents
    assert not any(number for (branch, _, _), number in most.items() if branch not in branches)


def held(value):
    """All tensors in a state, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from held(each)
