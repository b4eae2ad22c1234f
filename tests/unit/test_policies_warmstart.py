"""Warm start over generations: what is reused, what is computed, and what the inner policy makes of it."""

import pytest
import torch

from edit_ray.cache.policies import CachePolicy, DiCache, FirstBlockCache, SeaCache, TaylorSeer, WarmstartReuse
from tests.unit.policy_unit import RecordedSignals, Unit

STEPS = 8
EVERY_OTHER = {"inner": "teacache", "coefficients": [0.6], "rel_l1_thresh": 1.0}  # every change counts as 0.6


def signals(count=STEPS):
    return [RecordedSignals(e=torch.full((1, 2), 1.0 + step)) for step in range(count)]


def generation(policy, number, before=None, window=(), steps=STEPS):
    """One generation; its residuals are its number in hundreds plus the step. Returns the unit, mask and outputs."""
    unit = Unit(policy, steps, generation=number, before=before, window=window)
    seen = signals(steps)
    done = [
        unit.step(step, signals=seen[step], output=torch.full((1, 1, 1), 100.0 * number + step))
        for step in range(steps)
    ]
    return unit, [d.computed for d in done], [d.output.item() for d in done]


def test_an_opening_step_reuses_the_residual_of_that_step():
    policy = WarmstartReuse(warm_steps=3, **EVERY_OTHER)
    first, mask, outputs = generation(policy, 0)
    assert mask == [True, True, True, False, True, False, True, True]
    assert outputs == [0, 1, 2, 2, 4, 4, 6, 7]
    _, mask, outputs = generation(policy, 1, before=first, window=(0,))
    assert mask == [False, False, False, True, False, True, False, True]
    assert outputs == [0, 1, 2, 103, 103, 105, 105, 107]


def test_the_seeds_rule_rebuilds_from_the_last_computed_residuals():
    policy = WarmstartReuse(warm_steps=2, align="last", combine="mean", **EVERY_OTHER)
    unit, *_ = generation(policy, 0)
    unit, mask, outputs = generation(policy, 1, before=unit, window=(0,))
    assert mask[:3] == [False, False, True]
    assert outputs[:3] == [7, 7, 102]
    unit, _, outputs = generation(policy, 2, before=unit, window=(0, 1))
    assert outputs[:3] == [57, 57, 202]


def test_the_latest_or_the_mean_of_those_that_have_computed_the_step():
    for combine, expected in (("latest", [200, 201]), ("mean", [100, 101])):
        policy = WarmstartReuse(warm_steps=2, combine=combine, **EVERY_OTHER)
        unit = generation(policy, 0)[0]
        unit = generation(policy, 1, before=unit, window=(0,))[0]
        unit = generation(policy, 2, before=unit)[0]
        assert generation(policy, 3, before=unit, window=(0, 1, 2))[2][:2] == expected


def test_a_computed_opening_leaves_the_inner_policy_as_a_warm_one_does():
    """Its accumulator is 0, its previous signal the last step's; but only what was computed serves later steps."""
    policy = WarmstartReuse(warm_steps=2, inner="teacache", coefficients=[0.3], rel_l1_thresh=1.0)
    first, cold, _ = generation(policy, 0)
    _, warm, outputs = generation(policy, 1, before=first, window=(0,))
    assert cold == [True, True, False, False, False, True, False, True]
    assert warm == [False, False, True, False, False, False, True, True]
    assert outputs[2:5] == [102, 102, 102]


def test_without_a_window_and_warm_steps_it_is_the_inner_policy():
    inner = generation(WarmstartReuse(warm_steps=0, **EVERY_OTHER), 0)
    assert inner[1:] == generation(WarmstartReuse(warm_steps=1, **EVERY_OTHER), 0)[1:]
    assert inner[1] == [True, False, True, False, True, False, True, True]


def test_a_residual_that_the_store_lost_is_computed_again():
    policy = WarmstartReuse(warm_steps=2, **EVERY_OTHER)
    first = generation(policy, 0)[0]
    unit = Unit(policy, STEPS, generation=1, before=first, window=(0,))
    unit.lose(1)
    seen = signals()
    assert [unit.step(step, signals=seen[step]).computed for step in range(2)] == [False, True]


def test_what_later_generations_may_read_is_kept():
    assert [WarmstartReuse(warm_steps=2, **EVERY_OTHER).keeps(step) for step in range(4)] == [True, True, False, False]
    assert not any(WarmstartReuse(align="last", **EVERY_OTHER).keeps(step) for step in range(4))


class Twice(CachePolicy):
    """Half of the protocol is left to the base class: a warm step is then a decision like any other."""

    granularities = ("stack",)
    history_len = 3

    def reset(self, state):
        state.user["calls"] = 0

    def should_compute(self, ctx):
        ctx.state.user["calls"] += 1
        return ctx.state.user["calls"] % 2 == 1

    def on_computed(self, ctx):
        ctx.state.user["computed"] = ctx.step

    def check(self, num_steps):
        if num_steps == 13:
            raise ValueError("13")


def test_the_inner_policy_may_be_any():
    policy = WarmstartReuse(warm_steps=2, inner=Twice())
    assert (policy.granularities, policy.history_len, policy.timestep_only) == (("stack",), 3, False)
    assert not policy.needs_first_block_probe
    with pytest.raises(ValueError, match="13"):
        policy.check(13)
    first = generation(policy, 0)[0]
    unit, mask, _ = generation(policy, 1, before=first, window=(0,))
    assert mask[:5] == [False, False, True, False, True]
    assert unit.state.user["calls"] == STEPS
    assert unit.state.user["computed"] == unit.state.computed_steps[-1]


@pytest.mark.parametrize("inner", [FirstBlockCache, SeaCache, DiCache, TaylorSeer])
def test_what_the_inner_policy_needs_and_declares_holds(inner):
    policy, made = WarmstartReuse(inner=inner()), inner()
    for name in ("granularities", "needs_first_block_probe", "timestep_only", "history_len"):
        assert getattr(policy, name) == getattr(made, name)
    generator = torch.Generator().manual_seed(0)
    unit, hidden, probe = None, torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    for number in range(2):
        window = () if number == 0 else (0,)
        unit = Unit(policy, 6, generation=number, before=unit, window=window)
        mask = []
        for step in range(6):
            latents = torch.randn(1, 2, 2, 2, 2, generator=generator)
            seen = RecordedSignals(latents=latents, sigma=1 - step / 6)
            mask.append(unit.step(step, signals=seen, hidden=hidden, probe=probe).computed)
        assert mask[:3] == ([True] * 2 + mask[2:3] if number == 0 else [False, False, True])
