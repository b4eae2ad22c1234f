"""The search of masks, forecasts, units and the gate: its settings, its changes, its choices, and what it continues."""

import json
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.policies import make_policy
from edit_ray.cache.policies.lemica import LeMiCa
from edit_ray.testing import save_random_wan
from edit_ray.tuning.confidence import least_of_others, resampled_means
from edit_ray.tuning.journal import Journal
from edit_ray.tuning.likeness import Likeness
from edit_ray.tuning.rank import loop_of
from edit_ray.tuning.search import FORECASTS, MOST_UNITS, Loop, Setting, changes, lemica_setting, search
from edit_ray.tuning.tune import best, tune_by_search
from edit_ray.tuning.videos import PolicyUnfit, Videos
from tests.calls import load

STEPS = 5
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 4.0}
PROMPTS = ["a red circle", "a blue square", "a green circle", "a red square", "a blue circle"]

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def loops(draw):
    steps = draw(st.integers(2, 7))
    boundary = draw(st.integers(1, steps))
    experts = ("transformer",) * boundary + ("transformer_2",) * (steps - boundary)
    branches = draw(st.sampled_from([("cond",), ("cond", "uncond")]))
    return Loop(experts, branches, draw(st.sampled_from([1, 2, 6, 8])))


@st.composite
def some_settings(draw):
    """Reached from nothing by changes, as in a search."""
    setting = Setting(draw(loops()))
    if draw(st.booleans()):
        setting = setting.split() or setting
    for _ in range(draw(st.integers(0, 8))):
        there = list(changes(setting))
        if there:
            setting = there[draw(st.integers(0, len(there) - 1))][1]
    return setting


@settings(max_examples=150, deadline=None)
@given(some_settings())
def test_a_settings_options_say_what_it_skips(setting):
    loop, options = setting.loop, setting.options()
    make_policy("schedule", {key: options[key] for key in ("mask", "forecast") if key in options}).check(
        len(loop.experts)
    )
    gated = loop.gated(setting.gate)
    computed = 0.0
    for key, mask in options["mask"].items():
        own = [loop.experts[step] == key.split("/")[0] for step in range(len(mask))]
        left = [gated[step] and "uncond" in key for step in range(len(mask))]
        computed += sum(bool(m) for m, mine, out in zip(mask, own, left, strict=True) if mine and not out)
        assert mask[own.index(True)], "an expert's first step has nothing to reuse"
    forwards = len(loop.experts) * len(loop.branches)
    assert setting.blocks == pytest.approx(computed / setting.units / forwards)
    if setting.units > 1:
        size = 1 if options["granularity"] == "per_block" else options["granularity"]
        assert size * setting.units == loop.blocks
    assert ("cfg_gate" in options) == (setting.gate is not None)
    assert ("forecast" in options) == bool(set(setting.skips.values()) - {"reuse"})


@settings(max_examples=150, deadline=None)
@given(some_settings())
def test_every_change_skips_more_or_as_much_and_something_else(setting):
    found = list(changes(setting))
    assert len({name for name, _ in found}) == len(found)
    for name, changed in found:
        assert changed.blocks <= setting.blocks + 1e-9, name
        assert changed.options() != setting.options(), name
        assert set(changed.skips) <= set(changed.places)
    free = set(setting.places) - set(setting.skips)
    assert {f"skip {place}" for place in free} <= {name for name, _ in found}
    assert sum(name.split()[0] in ("reuse", *FORECASTS) for name, _ in found) == 3 * len(setting.skips)


@settings(max_examples=60, deadline=None)
@given(some_settings())
def test_splitting_changes_no_share(setting):
    halves = setting.split()
    if halves is None:
        assert 2 * setting.units > MOST_UNITS or setting.loop.blocks % (2 * setting.units)
    else:
        assert halves.blocks == pytest.approx(setting.blocks)
        assert len(halves.skips) == 2 * len(setting.skips)
        assert set(halves.skips) <= set(halves.places)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), max_size=3), min_size=3, max_size=8), st.integers(0, 8))
def test_the_start_is_the_path_of_lemica(errors, skips):
    loop = Loop(("transformer",) * len(errors), ("cond", "uncond"), 4)
    start = lemica_setting(loop, errors, skips)
    policy = LeMiCa(reuse_error=errors, skips=skips)
    for branch in loop.branches:
        assert [bool(m) for m in start.options()["mask"][f"transformer/{branch}"]] == policy.mask


# Choosing


def made_up(seed, videos):
    """A PSNR that falls with each skip, less for the right forecast, and more where neighbours are skipped."""

    def of(setting, needed):
        found = []
        for video in range(videos):
            lost = 0.0
            for place in Setting(setting.loop, units=setting.units).places:
                noise = random.Random(f"{seed} {place[0]} {place[2]}")
                cost, right = noise.uniform(0, 6), noise.choice(["reuse", *FORECASTS])
                if place in setting.skips:
                    lost += cost / setting.units * (0.6 if setting.skips[place] == right else 1)
                    before = (*place[:2], place[2] - 1)
                    lost += 0.5 / setting.units * (before in setting.skips)
            gated = sum(setting.loop.gated(setting.gate))
            found.append(50 - lost - 1.5 * gated - 0.1 * video)
        return found

    return of


def run(seed, loop, budget, floor=40.0, videos=3):
    """Every accepted setting, and how many videos were made."""
    spent = [0]
    inner = made_up(seed, videos)

    def measure(setting, needed):
        found = inner(setting, needed)
        spent[0] += len(found)
        assert len(needed) == videos
        return found

    return list(search(Setting(loop), measure, min, floor, videos, budget, seed)), spent[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 200))
def test_each_accepted_setting_is_better_than_the_one_before_and_the_budget_is_kept(seed, budget):
    loop = Loop(("transformer",) * 5, ("cond", "uncond"), 2)
    trail, spent = run(seed, loop, budget)
    assert spent <= max(budget, 3)
    assert trail[-1].videos <= spent
    for found in trail:
        assert found.low == min(found.psnr) >= 40
    for before, after in pairwise(trail):
        fewer = after.setting.blocks < before.setting.blocks - 1e-9
        assert fewer or (after.setting.blocks == pytest.approx(before.setting.blocks) and after.low > before.low)
    assert run(seed, loop, budget)[0] == trail, "the same measurements lead to the same choices"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("blocks", [1, 2])
def test_it_ends_where_no_change_helps(seed, blocks):
    loop = Loop(("transformer",) * 4, ("cond", "uncond"), blocks)
    trail, spent = run(seed, loop, 10**6)
    last, measure = trail[-1], made_up(seed, 3)
    assert last.setting.units == 1 if blocks == 1 else spent > 0
    halves = last.setting
    while (finer := halves.split()) is not None:
        halves = finer
    for _, changed in changes(halves):
        low = min(measure(changed, []))
        if changed.blocks < halves.blocks - 1e-9:
            assert low < 40
        else:
            assert low <= min(measure(halves, [])) + 1e-9
    assert last.setting.blocks < 1


def test_units_are_found_where_they_help():
    """Half of the stack costs nothing; the other half may not be skipped."""
    loop = Loop(("transformer",) * 3, ("cond",), 2)

    def measure(setting, needed):
        whole = 2 // setting.units
        lost = sum(20 for _, unit, _ in setting.skips if whole == 2 or unit == 1)
        return [45.0 - lost] * 2

    trail = list(search(Setting(loop), measure, min, 40, 2, 10**6))
    assert trail[0].setting.blocks == 1
    assert trail[-1].setting.units == 2
    assert set(trail[-1].setting.skips) == {("transformer/cond", 0, 1), ("transformer/cond", 0, 2)}


def test_a_start_that_does_not_hold_is_none():
    loop = Loop(("transformer",) * 3, ("cond",), 2)
    assert list(search(Setting(loop), lambda setting, needed: [39.0] * 2, min, 40, 2, 100)) == []
    assert list(search(Setting(loop), lambda setting, needed: [50.0], min, 40, 2, 100)) == [], "given up"


# Confidence


def test_as_many_others_are_above_the_bound_as_often_as_it_says():
    draws = torch.randn(400, 2, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def held(draws):
        return sum(others.mean().item() >= least_of_others(own.tolist(), 1) for own, others in draws) / len(draws)

    assert 0.92 <= held(draws) <= 0.98
    assert 0.8 <= held(-draws.exp()) < 0.9, "20 prompts hardly show a long tail downwards"


def test_a_bound_counts_prompts_and_not_their_videos():
    alike = [30.0, 32.0, 28.0, 34.0]
    doubled = [each for each in alike for _ in range(2)]
    assert least_of_others(doubled, 2) == pytest.approx(least_of_others(alike, 1), abs=1e-9)
    assert least_of_others(doubled, 1) > least_of_others(doubled, 2)
    assert least_of_others([30.0, 31.0], 2) == float("-inf"), "one prompt says nothing of others"
    assert least_of_others([30.0] * 4, 1) == 30.0
    assert resampled_means([1.0, 3.0, 0.0, 4.0], 2, 50).unique().tolist() == [2.0]


# The journal


def test_a_journal_continues_and_forgets_a_torn_line(tmp_path):
    path, about = tmp_path / "measured.jsonl", {"prompts": ["a"], "calibration": None}
    journal = Journal(path, about)
    journal.put("x", 0, [1.5, 2.0])
    journal.put("x", 1, [3.0])
    with path.open("ab") as file:
        file.write(b'{"name": "y", "vid')
    again = Journal(path, about)
    assert (again.get("x", 0), again.get("x", 1), again.get("y", 0)) == ([1.5, 2.0], [3.0], None)
    again.put("y", 0, [4.0])
    assert Journal(path, about).get("y", 0) == [4.0], "the torn line was ended"
    assert len(Journal(path, about)) == 3


@pytest.mark.parametrize("content", ['{"about": {"prompts": ["b"]}}\n', '{"name": "x", "video": 0, "found": []}\n'])
def test_a_journal_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "measured.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="has measurements of another model, prompts or sampling; give another file"):
        Journal(path, {"prompts": ["a"]})


@pytest.mark.parametrize("content", ["[1]\n", '{"policy": "x"}\n'])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    path = tmp_path / "measured.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no file of measurements"):
        Journal(path, {})


# On a pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load(save_random_wan(tmp_path_factory.mktemp("model") / "wan"), device="cpu")


def test_videos_compute_the_share_that_a_setting_says(pipe):
    loop, videos = loop_of(pipe, CALL), Videos(pipe, PROMPTS[:1], 5, CALL)
    assert (loop.experts, loop.branches, loop.blocks) == (("transformer",) * STEPS, ("cond", "uncond"), 2)
    place = ("transformer/cond", 0, 2)
    whole = Setting(loop).skipping(place).skipping(("transformer/uncond", 0, 3), "linear")
    for setting in (Setting(loop), whole, whole.split(), whole.split().computing(place), whole.gated_from(3)):
        ((alike, share),) = videos("schedule", setting.options())
        assert share == pytest.approx(setting.blocks)
        assert (alike.psnr < 100) == (setting.blocks < 1)
    figures = [next(videos("schedule", of.options()))[0].psnr for of in (whole, whole.split())]
    assert figures[0] == pytest.approx(figures[1], abs=0.5), "units that are skipped together are the stack"
    assert videos.made == 1 + 5, "nothing is made twice"
    near = [next(videos.latents("schedule", of.options(), [0])) for of in (Setting(loop), whole)]
    assert near[0] == 100 > near[1]


def test_an_interrupted_search_continues_with_the_same_choices(pipe, tmp_path):
    class Stop(Exception):
        pass

    def searched(path, stop_at=None):
        videos = Videos(pipe, PROMPTS, 5, CALL, journal=Journal(path, {}))
        measure = videos._measure

        def measured(*arguments):
            if stop_at is not None and videos.made >= stop_at:
                raise Stop
            return measure(*arguments)

        videos._measure = measured
        lines = []
        trials = list(tune_by_search(videos, loop_of(pipe, CALL), 25.0, 120, lines.append))
        return trials, lines, videos.made

    trials, lines, made = searched(tmp_path / "whole.jsonl")
    assert trials[-1] == best(trials)
    assert trials[-1].low >= 25
    with pytest.raises(Stop):
        searched(tmp_path / "part.jsonl", stop_at=made // 2)
    again, said, more = searched(tmp_path / "part.jsonl")
    assert (again, said) == (trials, lines)
    assert more <= made // 2 + len(PROMPTS) + 1
    whole, part = ((tmp_path / name).read_text() for name in ("whole.jsonl", "part.jsonl"))
    assert whole == part
    assert searched(tmp_path / "part.jsonl") == (trials, lines, 0), "all is known"
    assert pipe.cache is None


class Known:
    """Videos whose PSNR is known: those of the prompts that are searched are `lead` dB better."""

    def __init__(self, number, lead):
        self.seeds, self.number, self.lead, self.asked = 1, number, lead, {}

    def __len__(self):
        return self.number

    def latents(self, policy, options, only):
        """3 dB below the frames."""
        yield from (found.psnr - 3 for found, _ in self(policy, options, only))

    def __call__(self, policy, options, only):
        skipped = sum(mask.count(0) for mask in options["mask"].values())
        for video in only:
            self.asked.setdefault(json.dumps(options), set()).add(video)
            psnr = 40.0 - skipped + self.lead * (video % 2 == 0) + 0.001 * video
            yield Likeness(psnr, 1.0, 0.0, 0.0, psnr, 1.0, 0.0), 1 - skipped / 12


@pytest.mark.parametrize("lead", [0.0, 2.0])
def test_what_is_found_is_checked_on_prompts_that_were_not_searched(lead):
    videos, loop = Known(12, lead), Loop(("transformer",) * 6, ("cond",), 1)
    trials = list(tune_by_search(videos, loop, 37.0, 10**4))
    assert [trial.verdict for trial in trials] == ["too far"] * (len(trials) - 1) + ["holds"]
    assert (len(trials) > 1) == (lead > 0), "what its own prompts flattered does not hold"
    assert trials[-1].options["mask"]["transformer/cond"].count(0) == 3
    assert [trial.blocks for trial in trials] == sorted(trial.blocks for trial in trials)
    for trial in trials:
        assert videos.asked[json.dumps(trial.options)] & {1, 3, 5, 7, 9, 11}


def test_a_search_takes_prompts_to_check_on(pipe):
    with pytest.raises(ValueError, match="the search takes at least 4 prompts, and has 3"):
        list(tune_by_search(Videos(pipe, PROMPTS[:3], 5, CALL, seeds=2), loop_of(pipe, CALL), 25.0, 50))


def test_options_that_no_policy_takes_are_unfit(pipe):
    with pytest.raises(PolicyUnfit, match="granularity is 7"):
        list(Videos(pipe, PROMPTS[:1], 5, CALL)("schedule", {"mask": [1] * STEPS, "granularity": 7}))
