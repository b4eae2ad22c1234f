"""Spectrum, FoCa, DMD and EasyCache against plain transcriptions of their published rules."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray import EditWanPipeline
from edit_ray.cache.policies import DynamicModes, EasyCache, FoCa, Schedule, Spectrum
from edit_ray.cache.policies.dmd import decompose, equally_distant, inner_products
from edit_ray.cache.policies.estimates import forecast, weighted_sum
from edit_ray.cache.policies.spectrum import growing_mask
from edit_ray.testing import save_random_wan
from tests.unit import cached
from tests.unit.policy_unit import RecordedSignals, Unit

SEEDS = st.integers(0, 2**32)
SHAPE = (2, 3, 4)

pytestmark = pytest.mark.usefixtures("one_thread")


def walked(unit, residuals, inputs=None):
    """What a unit does when its blocks add `residuals` [S, B, N, D] to `inputs`, of the same shape, or to zeros."""
    inputs = torch.zeros_like(residuals) if inputs is None else inputs
    each = zip(inputs, residuals, strict=True)
    return [unit.step(step, hidden=x, output=x + added) for step, (x, added) in enumerate(each)]


def drawn(count, seed, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


# As the value of a skip in a mask of one's own


@pytest.mark.parametrize("policy", [Spectrum(), DynamicModes(cache_interval=2)])
def test_a_schedule_forecasts_as_the_policy_of_that_name(policy):
    name = "spectrum" if isinstance(policy, Spectrum) else "dmd"
    residuals = drawn(20, 3)
    theirs = walked(Unit(policy, 20), residuals)
    mask = [done.computed for done in theirs]
    ours = Schedule(mask=mask, forecast=name)
    assert all(torch.equal(a.output, b.output) for a, b in zip(walked(Unit(ours, 20), residuals), theirs, strict=True))
    assert mask.count(False) > 5
    assert ours.history_len == policy.history_len
    assert ours.most_stored(20) == policy.most_stored(20)


def test_a_schedules_forecasts_may_differ_by_step_branch_and_unit():
    names = ["reuse", "reuse", "linear", "spectrum", "dmd", "reuse", "reuse", "linear"]
    mask, residuals = [1, 1, 0, 0, 0, 1, 0, 0], drawn(8, 4)
    mixed = Schedule(mask=mask, forecast=names)
    alone = {name: walked(Unit(Schedule(mask=mask, forecast=name), 8), residuals) for name in set(names)}
    for step, done in enumerate(walked(Unit(mixed, 8), residuals)):
        assert torch.equal(done.output, alone[names[step]][step].output)
    other = Schedule(mask=mask, forecast={"cond": "linear", "uncond": "reuse", "transformer/cond/0": names})
    assert torch.equal(walked(Unit(other, 8), residuals)[4].output, alone["dmd"][4].output)
    uncond = walked(Unit(other, 8, branch="uncond"), residuals)
    assert torch.equal(uncond[4].output, alone["reuse"][4].output)
    second = walked(Unit(other, 8, expert="transformer_2"), residuals)
    assert torch.equal(second[4].output, alone["linear"][4].output)


# Spectrum


class OfficialSpectrum:
    """`wan_forward.py` and `basis_utils.py` of one branch, in float64."""

    def __init__(self, warmup_steps, window_size, flex_window, m, lam, w):
        self.warmup_steps, self.curr_ws, self.flex_window = warmup_steps, window_size, flex_window
        self.m, self.lam, self.w = m, lam, w
        self.cnt = self.consecutive = 0
        self.t, self.h = [], []

    def actual_forward(self):
        actual = True
        if self.cnt >= self.warmup_steps:
            actual = (self.consecutive + 1) % math.floor(self.curr_ws) == 0
            if actual:
                self.curr_ws = round(self.curr_ws + self.flex_window, 3)
        self.cnt += 1
        self.consecutive = 0 if actual else self.consecutive + 1
        return actual

    def design(self, steps):
        tau = (torch.tensor(steps, dtype=torch.float64) - 25) * 2 / 50
        columns = [torch.ones_like(tau), tau]
        while len(columns) <= self.m:
            columns.append(2 * tau * columns[-1] - columns[-2])
        return torch.stack(columns[: self.m + 1], dim=1)

    def predict(self, step):
        x, h = self.design(self.t), torch.stack(self.h).double().flatten(1)
        lower = torch.linalg.cholesky(x.T @ x + self.lam * torch.eye(self.m + 1, dtype=torch.float64))
        coefficients = torch.cholesky_solve(x.T @ h, lower)
        spectral = (self.design([step]) @ coefficients).reshape(self.h[-1].shape)
        if len(self.t) < 2:
            local = self.h[-1].double()
        else:
            k = (step - self.t[-1]) / (self.t[-1] - self.t[-2])
            local = self.h[-1].double() + k * (self.h[-1].double() - self.h[-2].double())
        return (1 - self.w) * local + self.w * spectral


@settings(max_examples=60, deadline=None)
@given(
    warmup_steps=st.integers(1, 8),
    window_size=st.floats(1, 6),
    flex_window=st.floats(0, 4),
    m=st.integers(0, 6),
    lam=st.floats(0.01, 10),
    w=st.floats(0, 1),
    num_steps=st.integers(1, 50),
    seed=SEEDS,
)
def test_spectrum_computes_and_forecasts_as_its_authors(
    warmup_steps, window_size, flex_window, m, lam, w, num_steps, seed
):
    options = {"warmup_steps": warmup_steps, "window_size": window_size, "flex_window": flex_window}
    theirs = OfficialSpectrum(**options, m=m, lam=lam, w=w)
    unit = Unit(Spectrum(**options, m=m, lam=lam, w=w), num_steps)
    residuals = drawn(num_steps, seed)
    for step, done in enumerate(walked(unit, residuals)):
        assert done.computed is theirs.actual_forward()
        if done.computed:
            theirs.t.append(step)
            theirs.h.append(residuals[step])
        else:
            torch.testing.assert_close(done.output.double(), theirs.predict(step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("flex_window", "computed"), [(0.75, 14), (3.0, 10)])
def test_spectrum_computes_as_many_of_50_steps_as_published(flex_window, computed):
    mask = Unit(Spectrum(flex_window=flex_window), 50).mask()
    assert mask == growing_mask(50, 5, 2.0, flex_window)
    assert sum(mask) == computed == Spectrum(flex_window=flex_window).most_stored(50)


def test_the_polynomials_of_spectrum_range_over_50_steps_or_a_longer_loop():
    computed, policy = [7, 5, 4, 3, 2, 1, 0], Spectrum()
    assert policy.weights(computed, 8, 20) == policy.weights(computed, 8, 50) != policy.weights(computed, 8, 100)
    doubled = [2 * step for step in computed]
    assert policy.weights(doubled, 16, 100) == pytest.approx(policy.weights(computed, 8, 50))


def test_each_expert_of_spectrum_begins_with_its_own_first_steps():
    unit = Unit(Spectrum(warmup_steps=2), 8, expert="transformer_2")
    assert [unit.step(step).computed for step in range(3, 8)] == [True, True, False, True, False]


# FoCa


class OfficialFoCa:
    """`calibrators/foca.py` in float64, with the anchors' difference divided by their distance."""

    def __init__(self, max_horizon=3.0):
        self.max_horizon, self.full, self.values = max_horizon, [], []

    def update(self, step, y):
        self.full.append((step, y.double()))
        self.values.append(y.double())

    def approximate(self, step):
        (last, anchor) = self.full[-1]
        if len(self.full) < 2:
            predicted = anchor
        else:
            before, anchor_before = self.full[-2]
            elapsed = step - last
            rates = (anchor - anchor_before) / (last - before) + self.values[-1] - self.values[-2]
            if elapsed <= self.max_horizon:
                predicted = anchor + elapsed / 2 * rates
            else:
                share = self.max_horizon / elapsed
                predicted = share * (anchor + self.max_horizon / 2 * rates) + (1 - share) * anchor
        self.values.append(predicted)
        return predicted


@settings(max_examples=60, deadline=None)
@given(
    cache_interval=st.integers(1, 8),
    first=st.integers(0, 6),
    max_horizon=st.floats(0.5, 9),
    num_steps=st.integers(1, 30),
    seed=SEEDS,
)
def test_foca_forecasts_as_cache_dit_at_the_steps_of_taylorseer(cache_interval, first, max_horizon, num_steps, seed):
    options = {"cache_interval": cache_interval, "disable_cache_before_step": first}
    policy = FoCa(**options, max_horizon=max_horizon, history_size=99)
    theirs, residuals = OfficialFoCa(max_horizon), drawn(num_steps, seed)
    for step, done in enumerate(walked(Unit(policy, num_steps), residuals)):
        due = cache_interval == 1 or step < first or (step - first - 1) % cache_interval == 0
        assert done.computed is (due or step == 0)
        if done.computed:
            theirs.update(step, residuals[step])
        else:
            torch.testing.assert_close(done.output.double(), theirs.approximate(step), rtol=1e-4, atol=1e-4)


def test_a_short_history_of_foca_is_a_loop_that_began_later():
    policy, residuals = FoCa(cache_interval=3, disable_cache_before_step=2, history_size=3), drawn(30, 0)
    done = walked(Unit(policy, 30), residuals)
    computed = [step for step, of in enumerate(done) if of.computed]
    for step, of in enumerate(done):
        kept = [at for at in computed if at < step][-3:]
        if not of.computed and len(kept) == 3:
            theirs = OfficialFoCa()
            for at in range(kept[0], step):
                theirs.update(at, residuals[at]) if at in kept else theirs.approximate(at)
            torch.testing.assert_close(of.output.double(), theirs.approximate(step), rtol=1e-4, atol=1e-4)


# DMD


def official_dmd(snapshots, k, rank=0, ridge=1e-8):
    """`calibrators/dmd.py` of one video: snapshots [n, ...], oldest first, by the singular value decomposition."""
    trajectory = snapshots.double().flatten(1).T
    x, after = trajectory[:, :-1], trajectory[:, 1:]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    r = rank or max(1, int((s > s[0] * 1e-4).sum()))
    u, s, v = u[:, :r], s[:r], vh[:r].mH
    inverted = (1 / (s + ridge)).to(torch.complex128)
    eigenvalues, w = torch.linalg.eig((u.mH @ after @ v).to(torch.complex128) * inverted)
    modes = ((after @ v).to(torch.complex128) * inverted) @ w
    amplitudes = torch.linalg.lstsq(modes, trajectory[:, -1:].to(torch.complex128)).solution[:, 0]
    return (modes @ (eigenvalues.pow(k) * amplitudes)).real.reshape(snapshots.shape[1:])


@settings(max_examples=50, deadline=None)
@given(count=st.integers(4, 6), rank=st.integers(0, 5), ahead=st.integers(1, 4), interval=st.integers(2, 5), seed=SEEDS)
def test_dmd_forecasts_as_cache_dit_for_each_video_of_a_batch(count, rank, ahead, interval, seed):
    """Decaying exponentials of both signs with a little noise: their modes are well determined."""
    random = torch.Generator().manual_seed(seed)
    rates = torch.tensor([0.95, 0.7, -0.5])[:, None] ** torch.arange(count) * torch.tensor([3.0, 2.0, 1.0])[:, None]
    residuals = torch.einsum("rs,bnr->sbn", rates, torch.randn(2, 40, 3, generator=random))[..., None]
    residuals = residuals + 0.02 * torch.randn(residuals.shape, generator=random)
    rank = min(rank, count - 1)
    ahead = min(ahead, interval - 1)
    unit = Unit(DynamicModes(cache_interval=interval, history_size=count, rank=rank), 60)
    for index in range(count):
        unit.step(index * interval, hidden=torch.zeros(2, 40, 1), output=residuals[index], force=True)
    step = (count - 1) * interval + ahead
    done = unit.step(step, hidden=torch.zeros(2, 40, 1), force=False)
    for video in range(2):
        expected = official_dmd(residuals[:, video], ahead / interval, rank)
        torch.testing.assert_close(done.output[video].double(), expected, rtol=1e-3, atol=1e-3)


def test_dmd_is_exact_on_exponentials_where_a_line_is_not():
    residuals = torch.stack([torch.tensor([[[0.9**s, 0.5 * 0.6**s, (-0.3) ** s]]]) for s in range(12)])
    residuals = residuals + residuals.roll(1, dims=-1)
    unit = Unit(DynamicModes(cache_interval=4, disable_cache_before_step=6), 12)
    done = walked(unit, residuals)
    skipped = [step for step in (6, 8, 9, 10) if not done[step].computed]
    assert skipped == [6, 8, 9, 10]
    torch.testing.assert_close(done[6].output, residuals[6], rtol=1e-4, atol=1e-5)
    history = [(step, residuals[step]) for step in (5, 4)]
    assert not torch.allclose(forecast(history, 6, 1), residuals[6], rtol=1e-2)


def test_with_fewer_than_four_equal_distances_dmd_is_taylorseer():
    residuals, unit = drawn(12, 1), Unit(DynamicModes(cache_interval=3, disable_cache_before_step=3, max_order=2), 12)
    done = walked(unit, residuals)
    computed = [step for step, of in enumerate(done) if of.computed]
    assert computed == [0, 1, 2, 4, 7, 10]
    for step in (3, 5, 6, 8, 9, 11):
        history = [(at, residuals[at]) for at in reversed(computed) if at < step]
        if equally_distant([at for at, _ in history]) < 4:
            assert torch.equal(done[step].output, forecast(history, step, 2))
    assert equally_distant([10, 7, 4, 2, 1, 0]) == 3
    assert equally_distant([5]) == 1


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_dmd_reuses_the_newest_residual_where_there_are_no_modes(value):
    residuals = torch.full((6, 2, 3, 4), value)
    residuals[:, 1] = drawn(6, 2)[:, 1]
    unit = Unit(DynamicModes(cache_interval=9, disable_cache_before_step=5, history_size=5), 6)
    done = walked(unit, residuals)[5]
    assert not done.computed
    assert torch.equal(done.output[0], residuals[4, 0]) or value != 0
    expected = official_dmd(residuals[:5, 1], 1.0)
    torch.testing.assert_close(done.output[1].double(), expected, rtol=1e-3, atol=1e-3)


def test_dmd_finds_its_modes_once_after_each_computed_step(monkeypatch):
    unit, found = Unit(DynamicModes(cache_interval=4, disable_cache_before_step=6), 40), []
    decide = unit.policy._fit
    monkeypatch.setattr(unit.policy, "_fit", lambda residuals: found.append(len(residuals)) or decide(residuals))
    done = walked(unit, drawn(40, 3))
    gaps = [later - earlier for earlier, later in pairwise(s for s, of in enumerate(done) if of.computed)]
    assert gaps[:8] == [1, 1, 1, 1, 1, 2, 4, 4]
    assert found == [6, 4, 5, *[6] * (len(found) - 3)]


def test_inner_products_are_taken_in_parts():
    residuals = [torch.randn(2, 3, 2**19, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    flat = torch.stack([residual.flatten(1) for residual in residuals], dim=1).double()
    assert inner_products(residuals) == pytest.approx((flat @ flat.mT).numpy(), rel=1e-9)


def test_modes_of_equal_residuals_do_not_move():
    modes = decompose(np.ones((5, 5)), rank=0, ridge=0.0)
    assert modes.weights(3.0).sum() == pytest.approx(1.0)


# What they share


def test_a_weighted_sum_is_rounded_once():
    residuals = [torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert weighted_sum(residuals, [1.0, 1.0, 1.0]).item() == 258.0
    assert weighted_sum(residuals, [1.0, 1.0, 1.0]).dtype == torch.bfloat16
    assert weighted_sum(residuals, [torch.full((1, 1, 1), weight) for weight in (1.0, 2.0, 2.0)]).item() == 260.0
    assert weighted_sum([residual.double() for residual in residuals], [0.5, 0.0, 1.0]).dtype == torch.float64


@pytest.mark.parametrize("policy", [Spectrum(), Spectrum(history_size=4), FoCa(), DynamicModes(), EasyCache()])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_no_unit_stores_more_than_it_says(policy, num_steps):
    unit, most = Unit(policy, num_steps), 0
    for step in range(num_steps):
        unit.step(step, signals=RecordedSignals(latents=torch.full((1, 1, 1, 1, 1), step)))
        most = max(most, len(unit.index.entries()))
    assert most == policy.most_stored(num_steps)


@pytest.mark.parametrize(
    "policy",
    [
        Spectrum(warmup_steps=3),
        FoCa(cache_interval=3, disable_cache_before_step=3),
        DynamicModes(cache_interval=3, disable_cache_before_step=5),
    ],
)
def test_a_lost_anchor_is_computed_again(policy):
    unit = Unit(policy, 12)
    mask = Unit(policy, 12).mask()
    first = mask.index(False)
    for step in range(first):
        unit.step(step)
    unit.lose(0)
    assert unit.step(first).computed is (policy.history_len >= first)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("spectrum", {"warmup_steps": 2}),
        ("foca", {"cache_interval": 3, "disable_cache_before_step": 1}),
        ("dmd", {"cache_interval": 2, "disable_cache_before_step": 2}),
    ],
)
def test_anchors_are_of_the_own_unit_branch_and_expert(tmp_path, policy, options):
    """What stands in is the weighted sum of what this unit has computed before, and of nothing else."""
    folder = save_random_wan(tmp_path, num_layers=3, two_experts=True, boundary_ratio=0.8)
    pipe = cached.quiet(EditWanPipeline.from_pretrained(folder))
    computed, reused = {}, []

    def keep(ctx):
        owner = ctx.expert, ctx.branch, ctx.unit_index
        if ctx.decision == "compute":
            return lambda residual: computed.setdefault(owner, []).append((ctx.step, residual.clone())) or residual
        anchors = ctx.residuals.history()
        reused.append(owner)
        expected = computed[owner][::-1][: len(anchors)]
        assert [step for step, _ in anchors] == [step for step, _ in expected]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(anchors, expected, strict=True))
        return None

    cache = pipe.enable_cache(policy, 9, "per_block", **options)
    cache.on_unit(keep)
    plan = cache.plan()
    cached.latents(pipe, num_inference_steps=9, guidance_scale=3.0)
    assert {owner[0] for owner in reused} == {"transformer", "transformer_2"}
    assert len(set(reused)) == len(plan) == 2 * 2 * 3
    for expert, branch, unit in plan:
        made = {
            d.step: d.decision == "compute"
            for d in cache.record
            if (d.expert, d.branch, d.unit) == (expert, branch, unit)
        }
        assert made == {step: c for step, c in enumerate(plan[expert, branch, unit]) if c is not None}


# EasyCache


class OfficialEasyCache:
    """`easycache_generate.py` in words of one forward: even ones are cond, odd ones uncond."""

    def __init__(self, thresh, ret_steps, num_steps):
        self.thresh, self.ret_steps, self.num_steps = thresh, 2 * ret_steps, 2 * num_steps
        self.cnt, self.accumulated, self.should_calc = 0, 0.0, True
        self.k = self.previous_input = self.previous_output = self.input_before = None

    def forward(self, raw_input, raw_output):
        even = self.cnt % 2 == 0
        if even:
            if self.cnt < self.ret_steps or self.cnt >= self.num_steps - 2:
                self.should_calc, self.accumulated = True, 0.0
            elif self.previous_input is not None and self.previous_output is not None and self.k is not None:
                change = (raw_input - self.previous_input).abs().mean()
                self.accumulated += self.k * (change / self.previous_output.abs().mean())
                self.should_calc = not self.accumulated < self.thresh
                if self.should_calc:
                    self.accumulated = 0.0
            else:
                self.should_calc = True
            self.previous_input = raw_input.clone()
        if even and self.should_calc:
            if self.previous_output is not None and self.input_before is not None:
                change = (self.previous_input - self.input_before).abs().mean()
                self.k = (raw_output - self.previous_output).abs().mean() / change
            self.input_before, self.previous_output = self.previous_input, raw_output.clone()
        self.cnt += 1
        return self.should_calc


@settings(max_examples=60, deadline=None)
@given(
    thresh=st.floats(0.001, 3),
    ret_steps=st.integers(0, 12),
    num_steps=st.integers(1, 30),
    drift=st.floats(0.01, 0.5),
    seed=SEEDS,
)
def test_easycache_masks_are_the_official_ones(thresh, ret_steps, num_steps, drift, seed):
    policy, theirs = EasyCache(thresh=thresh, ret_steps=ret_steps), OfficialEasyCache(thresh, ret_steps, num_steps)
    units = [Unit(policy, num_steps, branch=branch) for branch in ("cond", "uncond")]
    latents = torch.cumsum(drift * drawn(num_steps, seed, (1, 2, 2, 4, 4)), dim=0)
    outputs = torch.cumsum(drift * drawn(num_steps, seed + 1), dim=0) + 1
    for step in range(num_steps):
        signals = RecordedSignals(latents=latents[step])
        for unit in units:
            done = unit.step(step, signals=signals, hidden=torch.zeros(SHAPE), output=outputs[step])
            assert done.computed is theirs.forward(latents[step], outputs[step])


def test_easycache_skips_where_the_output_follows_little():
    """Outputs that move as fast as the latents change by 1/50 a step, against a threshold of 1/20."""
    policy = EasyCache(thresh=0.05, ret_steps=2)
    unit = Unit(policy, 12)
    done = []
    for step in range(12):
        moved = torch.full((1, 1, 1), 50.0 + step)
        signals = RecordedSignals(latents=torch.full((1, 1, 1, 1, 1), float(step)))
        done.append(unit.step(step, signals=signals, hidden=torch.zeros(1, 1, 1), output=moved))
    assert [of.computed for of in done] == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    assert done[2].ctx.signal == pytest.approx(1 / 51)
    assert done[3].ctx.accumulated == pytest.approx(2 / 51)


def test_uncond_of_easycache_computes_unless_cond_has_just_skipped():
    policy = EasyCache(thresh=10.0, ret_steps=0)
    cond, uncond = (Unit(policy, 9, branch=branch) for branch in ("cond", "uncond"))
    latents = [RecordedSignals(latents=torch.full((1, 1, 1, 1, 1), float(step))) for step in range(9)]
    assert [uncond.step(step, signals=latents[step]).computed for step in (0, 1, 2)] == [True, True, True]
    for step in range(4):
        decided = cond.step(step, signals=latents[step]).computed
        assert uncond.step(step, signals=latents[step]).computed is decided
    assert not decided
    assert uncond.step(4, signals=latents[4]).computed, "cond was not asked at this step"
    Unit(policy, 9)  # a new call
    assert uncond.step(3, signals=latents[3]).computed


def test_easycache_without_latents_is_a_sentence():
    with pytest.raises(ValueError, match="easycache compares a forward's latents; step 0 lacks them"):
        Unit(EasyCache(), 4).step(0)


def test_what_a_callback_does_to_the_latents_in_place_changes_no_decision():
    policy, latents = EasyCache(thresh=10.0, ret_steps=0), torch.zeros(1, 1, 1, 2, 2)
    unit = Unit(policy, 6)
    for step in range(3):
        unit.step(step, signals=RecordedSignals(latents=latents), output=torch.full((1, 1, 1), step + 1.0))
        latents += 1
    assert unit.state.user["rate"].item() == 1.0
