"""What options may be, what a policy must be, and that a threshold of 0 or below never skips."""

import math
import pickle
import re

import pytest
import torch

from edit_ray.cache.policies import (
    POLICIES,
    CachePolicy,
    DiCache,
    DynamicModes,
    EasyCache,
    FirstBlockCache,
    FoCa,
    LeMiCa,
    MagCache,
    OptionError,
    Schedule,
    SeaCache,
    Spectrum,
    TaylorSeer,
    TeaCache,
    WarmstartReuse,
    check_granularity,
    make_policy,
    register_policy,
)
from edit_ray.cache.policies.option_types import pick_per_branch
from edit_ray.cache.policies.teacache import WAN_COEFFICIENTS
from tests.unit.policy_unit import RecordedSignals, Unit

OPTIONS = {
    "always": {},
    "teacache": {"wan_variant": "t2v-1.3B"},
    "fbcache": {},
    "magcache": {"mag_ratios": [1.0]},
    "taylorseer": {},
    "seacache": {},
    "dicache": {},
    "dmd": {},
    "easycache": {},
    "foca": {},
    "lemica": {"reuse_error": [[1.0, 2.0]] * 12},
    "spectrum": {},
    "ranked": {"skip_rank": {"cond": [None, *range(11)], "uncond": [None] * 12}},
    "schedule": {"mask": [True] * 12},
    "warmstart_reuse": {"wan_variant": "t2v-1.3B"},
}
NEVER = [
    ("always", {}),
    *(("fbcache", {"rel_l1_thresh": at}) for at in (0, -1.0)),
    *(("magcache", {"threshold": at, "mag_ratios": [1.0]}) for at in (0, -1.0)),
    *(("magcache", {"max_skip_steps": 0, "mag_ratios": [1.0]}),),
    *((name, {"cache_interval": at}) for name in ("taylorseer", "dmd", "foca") for at in (1, 0, -3)),
    *(("easycache", {"thresh": at}) for at in (0, -1.0)),
    ("spectrum", {"window_size": 1, "flex_window": 0}),
    ("spectrum", {"warmup_steps": 12}),
    *(("lemica", {"reuse_error": [[1.0]] * 12, "skips": at}) for at in (0, -1)),
    ("lemica", {"reuse_error": [[]] * 12}),
    *(("seacache", {"threshold": at}) for at in (0, -1.0)),
    *(("dicache", {"rel_l1_thresh": at}) for at in (0, -1.0)),
    ("ranked", {"skip_rank": {"cond": [None] * 12}}),
    *(("ranked", {"skip_rank": list(range(12)), "skips": at}) for at in (0, -1)),
    ("schedule", {"mask": [True] * 12}),
    *(
        ("teacache", {"wan_variant": variant, "use_ret_steps": ret, "rel_l1_thresh": at})
        for variant in WAN_COEFFICIENTS
        for ret in (True, False)
        for at in (0, -1.0)
    ),
    ("warmstart_reuse", {"rel_l1_thresh": 0, "wan_variant": "t2v-14B"}),
]


SKIPS = [
    *((name, {"rel_l1_thresh": 0.01}) for name in ("fbcache", "dicache")),
    ("magcache", {"threshold": 0.01, "mag_ratios": [1.0]}),
    *((name, {"cache_interval": 2}) for name in ("taylorseer", "dmd", "foca")),
    ("spectrum", {}),
    ("lemica", {"reuse_error": [[0.5]] * 12, "skips": 1}),
    ("seacache", {"threshold": 0.01}),
    ("teacache", {"wan_variant": "t2v-14B", "rel_l1_thresh": 0.01}),
]


@pytest.mark.parametrize(
    ("name", "options", "skips"), [*((*each, False) for each in NEVER), *((*each, True) for each in SKIPS)], ids=str
)
def test_where_nothing_changes_never_means_never_and_a_threshold_above_0_skips(name, options, skips):
    unit = Unit(make_policy(name, options), 12)
    same = RecordedSignals(torch.ones(1, 2), torch.ones(1, 6, 2), torch.ones(1, 1, 2, 2, 2), 0.5)
    hidden, probe = torch.ones(1, 2, 2), torch.full((1, 2, 2), 2.0)
    mask = [unit.step(step, signals=same, hidden=hidden, probe=probe).computed for step in range(12)]
    assert all(mask) is not skips


def test_every_policy_is_made_by_its_name_and_declares_what_it_needs():
    assert all(type(make_policy(name, options)) is POLICIES.find(name) for name, options in OPTIONS.items())
    probes = {name for name, options in OPTIONS.items() if make_policy(name, options).needs_first_block_probe}
    static = {name for name, options in OPTIONS.items() if make_policy(name, options).timestep_only}
    assert probes == {"fbcache", "dicache"}
    assert set(OPTIONS) - static == {"fbcache", "dicache", "seacache", "easycache"}
    assert {name for name in OPTIONS if POLICIES.find(name).uncond_follows} == {"easycache"}
    assert WarmstartReuse(inner="easycache").uncond_follows


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: TeaCache(), ValueError, "(one of t2v-1.3B, t2v-14B, i2v-480p, i2v-720p) or coefficients="),
        (lambda: TeaCache(coefficients=[]), ValueError, "coefficients is empty"),
        (
            lambda: TeaCache(coefficients=[1, math.nan]),
            ValueError,
            "coefficients[1] is nan; it must be a finite number",
        ),
        (
            lambda: TeaCache(coefficients="12"),
            TypeError,
            "coefficients is '12'; it must be a sequence of finite numbers",
        ),
        (lambda: TeaCache(coefficients=3), TypeError, "coefficients is 3"),
        (lambda: TeaCache(coefficients=torch.ones(2, 2)), TypeError, "coefficients[0] is [1.0, 1.0]"),
        (lambda: TeaCache(coefficients={}), ValueError, "coefficients is an empty mapping"),
        (
            lambda: TeaCache(coefficients={"both": [1]}),
            ValueError,
            "coefficients has the key 'both'; a key must be one of",
        ),
        (lambda: TeaCache(coefficients={"/cond": [1]}), ValueError, "has the key '/cond'"),
        (lambda: Schedule(mask={"cond/0": [1]}), ValueError, 'or of one unit such as "transformer/cond/0".'),
        (lambda: Schedule(mask={"transformer/cond/x": [1]}), ValueError, "has the key 'transformer/cond/x'"),
        (lambda: TeaCache(wan_variant="t2v-14B", use_ret_steps=1), TypeError, "use_ret_steps is 1; it must be True or"),
        (
            lambda: TeaCache(wan_variant="t2v-14B", rel_l1_thresh=math.nan),
            ValueError,
            "rel_l1_thresh is nan; it must be",
        ),
        (lambda: TeaCache(wan_variant="t2v-14B", rel_l1_thresh="0.1"), TypeError, "rel_l1_thresh is '0.1'; it must be"),
        (lambda: TeaCache(wan_variant="t2v-14B", rel_l1_thresh=True), TypeError, "rel_l1_thresh is True"),
        (lambda: MagCache(mag_ratios=[1], threshold=math.nan), ValueError, "threshold is nan"),
        (lambda: MagCache(mag_ratios=[1], max_skip_steps=-1), ValueError, "max_skip_steps is -1; it must be a whole"),
        (lambda: MagCache(mag_ratios=[1], max_skip_steps=1.5), TypeError, "max_skip_steps is 1.5; it must be a whole"),
        (lambda: MagCache(mag_ratios=[1], retention_ratio=1.2), ValueError, "retention_ratio is 1.2; it must be a"),
        (lambda: TaylorSeer(cache_interval=2.0), TypeError, "cache_interval is 2.0; it must be a whole number."),
        (lambda: TaylorSeer(max_order=-1), ValueError, "max_order is -1; it must be a whole number from 0."),
        (lambda: TaylorSeer(disable_cache_before_step=-1), ValueError, "disable_cache_before_step is -1"),
        (lambda: TaylorSeer(disable_cache_after_step=-1), ValueError, "disable_cache_after_step is -1"),
        (lambda: Spectrum(warmup_steps=0), ValueError, "warmup_steps is 0; it must be a whole number from 1."),
        (lambda: Spectrum(flex_window=-0.5), ValueError, "flex_window is -0.5; it must be a finite number from 0."),
        (lambda: Spectrum(window_size=0), ValueError, "window_size is 0.0; it must be a finite number above 0."),
        (lambda: Spectrum(tau_num_steps=0), ValueError, "tau_num_steps is 0; it must be a whole number from 1."),
        (lambda: Spectrum(w=1.5), ValueError, "w is 1.5; it must be a finite number from 0 to 1."),
        (lambda: Spectrum(lam=0), ValueError, "lam is 0.0; it must be a finite number above 0."),
        (lambda: DynamicModes(history_size=3), ValueError, "history_size is 3; it must be a whole number from 4."),
        (lambda: DynamicModes(ridge=-1), ValueError, "ridge is -1.0; it must be a finite number from 0."),
        (lambda: FoCa(max_horizon=0), ValueError, "max_horizon is 0.0; it must be a finite number above 0."),
        (lambda: FoCa(cache_interval=2.5), TypeError, "cache_interval is 2.5; it must be a whole number."),
        (lambda: LeMiCa(reuse_error=[]), ValueError, "reuse_error is empty; it must be a sequence of sequences"),
        (
            lambda: LeMiCa(reuse_error=[1.0]),
            TypeError,
            "reuse_error[0] is 1.0; it must be a sequence of finite numbers",
        ),
        (lambda: LeMiCa(reuse_error=[[-1.0]]), ValueError, "reuse_error[0][0] is -1.0; it must be a finite number"),
        (lambda: LeMiCa(reuse_error=[[1]] * 3).check(4), ValueError, "reuse_error has 3 entries, and the loop has 4"),
        (lambda: EasyCache(thresh=math.nan), ValueError, "thresh is nan; it must be a finite number."),
        (lambda: EasyCache(ret_steps=-1), ValueError, "ret_steps is -1; it must be a whole number from 0."),
        (lambda: SeaCache(threshold=math.inf), ValueError, "threshold is inf"),
        (lambda: SeaCache(residual_order=2), ValueError, "residual_order is 2; it must be 0 or 1."),
        (lambda: SeaCache(power_exp=0), ValueError, "power_exp is 0.0; it must be a finite number above 0."),
        (lambda: SeaCache(max_consecutive_cached=-2), ValueError, "max_consecutive_cached is -2"),
        (lambda: SeaCache(retention_steps=-1), ValueError, "retention_steps is -1"),
        (lambda: SeaCache(cache_end_steps=True), TypeError, "cache_end_steps is True"),
        (lambda: DiCache(rel_l1_thresh=math.nan), ValueError, "rel_l1_thresh is nan"),
        (lambda: DiCache(probe_depth=2), ValueError, "probe_depth is 2; it must be 1, the unit's first block."),
        (lambda: DiCache(probe_depth=True), TypeError, "probe_depth is True; it must be 1"),
        (lambda: DiCache(retention_ratio=-0.1), ValueError, "retention_ratio is -0.1"),
        (lambda: Schedule(mask=[]), ValueError, "mask is empty; it must be a sequence of True and False"),
        (lambda: Schedule(mask="1011"), TypeError, "mask is '1011'; it must be a sequence of True and False"),
        (lambda: Schedule(mask=[True, 2]), TypeError, "mask[1] is 2; it must be True or False"),
        (
            lambda: Schedule(mask=[True], forecast="cubic"),
            ValueError,
            "forecast[0] is 'cubic'; it must be one of reuse, linear, spectrum or dmd.",
        ),
        (lambda: Schedule(mask=[True], forecast=[]), ValueError, "forecast is empty; it must be a sequence of reuse"),
        (lambda: Schedule(mask=[True], forecast=1), TypeError, "forecast is 1; it must be a sequence of reuse, linear"),
        (
            lambda: Schedule(mask=[True] * 3, forecast={"cond": ["reuse"] * 2}).check(3),
            ValueError,
            "forecast['cond'] has 2 entries, and the loop has 3 steps",
        ),
        (lambda: Schedule(mask=[True] * 4).check(5), ValueError, "mask has 4 entries, and the loop has 5 steps"),
        (lambda: Schedule(mask={"cond": [True]}).check(2), ValueError, "mask['cond'] has 1 entries, and the"),
        (lambda: WarmstartReuse(align="first", inner="always"), ValueError, "align is 'first'; it must be 'step' or"),
        (lambda: WarmstartReuse(combine="sum", inner="always"), ValueError, "combine is 'sum'; it must be 'latest' or"),
        (lambda: WarmstartReuse(warm_steps=-1, inner="always"), ValueError, "warm_steps is -1"),
        (lambda: WarmstartReuse(inner="teacup"), ValueError, "no cache policy named 'teacup'; there are always, "),
        (lambda: WarmstartReuse(), ValueError, "teacache takes either wan_variant="),
        (lambda: WarmstartReuse(inner="fbcache", thresh=1), TypeError, "'fbcache' has no option thresh; it takes"),
        (lambda: WarmstartReuse(inner=FirstBlockCache(), rel_l1_thresh=1), TypeError, "a policy that is made already"),
        (lambda: WarmstartReuse(inner=WarmstartReuse(inner="always")), ValueError, "inner is warmstart_reuse"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_a_sentence(make, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        make()


def test_an_error_names_its_option_also_in_another_process():
    says = "coefficients['cond'][0] is inf; it must be a finite number."
    with pytest.raises(OptionError, match=re.escape(says)) as caught:
        TeaCache(coefficients={"cond": [math.inf]})
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.option, str(error)) == ("coefficients", says)


@pytest.mark.parametrize(
    ("policy", "options", "error", "sentence"),
    [
        ("teacup", {}, ValueError, "no cache policy named 'teacup'; there are always, dicache, dmd, easycache"),
        (3, {}, TypeError, "policy is 3; it must be one of always, dicache"),
        ("fbcache", {"thresh": 1}, TypeError, "'fbcache' has no option thresh; it takes rel_l1_thresh."),
        ("schedule", {}, TypeError, "'schedule' needs the option mask; it takes mask, forecast."),
        (FirstBlockCache(), {"rel_l1_thresh": 1}, TypeError, "FirstBlockCache is a policy that is made already"),
    ],
)
def test_policies_that_cannot_be_made(policy, options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        make_policy(policy, options)


@pytest.fixture
def registered(monkeypatch):
    """Policies registered in a test are gone after it."""
    monkeypatch.setattr(POLICIES, "_classes", dict(POLICIES._classes))


@pytest.mark.usefixtures("registered")
def test_a_half_implemented_policy_is_refused():
    @register_policy("half")
    class Half(CachePolicy):
        pass

    with pytest.raises(TypeError, match=r"'half' \(.*Half\) lacks the method should_compute\."):
        make_policy("half", {})

    @register_policy("stranger")
    class Stranger:
        pass

    with pytest.raises(TypeError, match=r"'stranger' is .*Stranger, which is not a subclass of CachePolicy\."):
        make_policy("stranger", {})
    with pytest.raises(ValueError, match=r"The .* name 'stranger' is taken by .*Stranger\."):
        register_policy("stranger")(type("Stranger", (), {"__module__": "elsewhere"}))


@pytest.mark.parametrize(
    ("policy", "good", "bad", "sentence"),
    [
        (FirstBlockCache(), ["stack", 2], ["per_block", 1, 0, True, "2"], '"stack" or an integer from 2'),
        (MagCache(mag_ratios=[1]), ["stack"], ["per_block", 2, None], 'MagCache works with "stack".'),
        (TaylorSeer(), ["stack", "per_block", 1, 4], ["blocks", -1, 2.0, []], '"stack" or "per_block" or an integer'),
        (WarmstartReuse(inner=FirstBlockCache()), ["stack", 3], ["per_block"], 'WarmstartReuse works with "stack" or'),
    ],
)  # fmt: skip
def test_a_granularity_without_meaning_names_those_with_one(policy, good, bad, sentence):
    for granularity in good:
        check_granularity(policy, granularity)
    for granularity in bad:
        with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
            check_granularity(policy, granularity)
        assert str(caught.value).startswith(f"granularity is {granularity!r}; ")


@pytest.mark.parametrize("declared", [(), ("blocks",)])
def test_granularities_that_there_are_not(declared):
    class Odd(Schedule):
        granularities = declared

    with pytest.raises(TypeError, match="they must be some of stack, per_block, groups"):
        check_granularity(Odd(mask=[True]), "stack")


def test_the_narrowest_entry_is_picked():
    entries = TeaCache(coefficients={"cond": [1], "transformer_2/cond": [2], "uncond": [3]}).coefficients
    assert pick_per_branch("x", entries, "transformer", "cond") == (1,)
    assert pick_per_branch("x", entries, "transformer_2", "cond") == (2,)
    assert pick_per_branch("x", entries, "transformer_2", "uncond") == (3,)
    assert pick_per_branch("x", TeaCache(coefficients=[5]).coefficients, "any", "cond") == (5,)
    with pytest.raises(ValueError, match='x has entries for cond, none of which is for the branch "uncond" of "t"'):
        pick_per_branch("x", {"cond": 1}, "t", "uncond")


def test_a_subclass_adds_an_option_of_its_own_and_its_base_checks_the_others():
    class Later(TeaCache):
        def __init__(self, *, first: int = 3, **options):
            self.first = first  # before the base class makes its own options
            super().__init__(**options)

        def should_compute(self, ctx):
            return super().should_compute(ctx) or ctx.step < self.first

    policy = Later(first=2, coefficients=[1, 0])
    assert (policy.first, policy.rel_l1_thresh) == (2, 0.2)
    signals = [RecordedSignals(e=torch.ones(1, 2)) for _ in range(6)]
    assert Unit(policy, 6).mask(signals) == [True, True, False, False, False, True]
    policy.rel_l1_thresh = 0  # options may be changed while a cache runs
    assert all(Unit(policy, 6).mask(signals))
    with pytest.raises(OptionError, match=re.escape("rel_l1_thresh is 'x'; it must be a finite number.")):
        Later(coefficients=[1, 0], rel_l1_thresh="x")
    with pytest.raises(OptionError, match="has no option thresh; it takes"):
        Later(coefficients=[1, 0], thresh=1)


def test_an_attribute_that_a_subclass_sets_first_is_no_option():
    class Later(WarmstartReuse):
        def __init__(self, **options):
            self.first = 2
            super().__init__(**options)

    policy = Later(inner="teacache", coefficients=[1, 0])
    assert (policy.first, policy.warm_steps, policy.inner.coefficients) == (2, 2, {"": (1, 0)})
