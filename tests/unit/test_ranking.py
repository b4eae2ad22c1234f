"""Ranks of skips: found one after the other on any measure, and on a real pipeline at tiny size."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray import EditWanPipeline
from edit_ray.cache.policies.ranked import ranks_of
from edit_ray.cli import main
from edit_ray.engine.calibration import FILE_NAME
from edit_ray.testing import save_random_wan
from edit_ray.tuning.rank import SkipMeasure, rank_skips

STEPS = 5
CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "negative_prompt": "",
}
PROMPTS = ["a red circle", "a blue square", "a green circle"]
EXPERTS = ("transformer", "transformer_2")
COND, UNCOND = "transformer/cond", "transformer/uncond"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random_wan(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = EditWanPipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 14))
def test_costs_that_add_up_are_ranked_in_their_order(costs, most):
    slots = [(COND, step) for step in range(len(costs))]
    asked = []

    def measure(skipped):
        asked.append(tuple(skipped))
        return 100 - sum(costs[step] for _, step in skipped)

    rounds = list(rank_skips(measure, slots, most))
    ranked = [step for _, step in rounds[-1].skipped] if rounds else []
    assert [costs[step] for step in ranked] == sorted(costs)[:most]
    assert [len(done.skipped) for done in rounds] == list(range(1, min(most, len(costs)) + 1))
    assert all(done.likeness == measure(done.skipped) for done in rounds)
    assert len(asked) - len(rounds) <= len(costs) + 2 * len(ranked) * len(costs)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_skip_is_the_best_on_top_of_those_before(data):
    """For a likeness that falls as more is skipped, and more so the more is skipped near by."""
    size = data.draw(st.integers(1, 8))
    weights = data.draw(st.lists(st.integers(1, 30), min_size=size, max_size=size))

    def measure(skipped):
        steps = {step for _, step in skipped}
        return -sum(weights[step] * (1 + 3 * ((step - 1 in steps) + (step + 1 in steps))) for step in steps)

    slots = [(COND, step) for step in range(size)]
    skipped = []
    for done in rank_skips(measure, slots, size):
        best = max(measure([*skipped, slot]) for slot in slots if slot not in skipped)
        assert done.likeness == measure(done.skipped) == best
        skipped = list(done.skipped)
    assert sorted(skipped) == slots


def test_most_forwards_are_not_measured_again():
    costs = [2.0**step for step in range(40)]
    asked = []

    def measure(skipped):
        asked.append(skipped)
        return -sum(costs[step] for _, step in skipped)

    list(rank_skips(measure, [(COND, step) for step in range(40)], 26))
    assert len(asked) < 40 + 26 * 3, "of 40 + 39 + … + 15"


def test_ranks_are_those_of_the_order():
    ranks = ranks_of([(UNCOND, 3), (COND, 1), (UNCOND, 1)], [COND, UNCOND], 4)
    assert ranks == {COND: [None, 1, None, None], UNCOND: [None, 2, None, 0]}


def test_first_steps_cannot_be_skipped(pipe, tmp_path):
    assert SkipMeasure(pipe, PROMPTS[:1], 0, CALL).slots() == [
        (owner, step) for step in range(1, STEPS) for owner in (COND, UNCOND)
    ]
    alone = SkipMeasure(pipe, PROMPTS[:1], 0, CALL | {"guidance_scale": 1.0})
    assert alone.owners() == [COND]
    both = EditWanPipeline.from_pretrained(save_random_wan(tmp_path / "wan", two_experts=True), device="cpu")
    both.set_progress_bar_config(disable=True)
    measure = SkipMeasure(both, PROMPTS[:1], 0, CALL)
    assert measure.owners() == [f"{expert}/{branch}" for expert in EXPERTS for branch in ("cond", "uncond")]
    steps = [[step for owner, step in measure.slots() if owner == f"{expert}/cond"] for expert in EXPERTS]
    left_out = set(range(STEPS)) - {step for own in steps for step in own}
    assert left_out == {0, max(steps[0], default=0) + 1}, "the first step of each has nothing to reuse"
    assert measure(measure.slots()[:1]) < 100


def test_the_measure_is_the_mean_over_prompts_whatever_the_batch(pipe):
    one, all_at_once = (SkipMeasure(pipe, PROMPTS, 3, CALL, batch_size=size) for size in (1, 3))
    assert one([]) == all_at_once([]) == 100
    for skipped in ([(COND, 2)], [(UNCOND, 1), (COND, 3), (COND, 4)]):
        assert one(skipped) == pytest.approx(all_at_once(skipped), abs=0.05)
        assert one(skipped) < 100

    def latents(**more):
        return pipe(PROMPTS[0], **CALL, generator=torch.Generator().manual_seed(3), output_type="latent", **more).frames

    reference = latents()
    pipe.enable_cache("schedule", STEPS, mask={"cond": [1, 1, 0, 1, 1], "uncond": [1] * STEPS})
    error = (latents() - reference).square().mean()
    pipe.disable_cache()
    measured = SkipMeasure(pipe, PROMPTS[:1], 3, CALL)([(COND, 2)])
    assert measured == pytest.approx(-10 * error.log10().item(), abs=0.001), "in dB; sums have another order with SSE"


def test_the_command_ranks_and_the_pipeline_picks_it_up(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {folder}, device: cpu}}\n"
        f"sampling: {{height: 32, width: 32, num_frames: 5, num_inference_steps: {STEPS}}}\n"
        "video: {num_segments: 1}\ncontinuity: {mode: none}\n"
        "prompt_segments: [{segment: 0, prompt: a green circle}]\n"
    )
    file = tmp_path / FILE_NAME
    command = ["calibrate", "--config", config, "--policy", "ranked", "--prompts", tmp_path / "prompts.txt"]
    command += ["--file", file, "--batch-size"]
    assert main([*map(str, command), "0"]) == 2
    assert "--batch-size is 0" in capsys.readouterr().err
    assert main([*map(str, command), "2"]) == 0
    assert "6 of 10 forwards skipped" in capsys.readouterr().err
    content = json.loads(file.read_text())
    ranks = content["policies"]["ranked"]["skip_rank"]
    assert sorted(rank for ranked in ranks.values() for rank in ranked if rank is not None) == list(range(6))

    (folder / FILE_NAME).write_bytes(file.read_bytes())
    pipe = EditWanPipeline.from_pretrained(folder, device="cpu")
    for speedup, computed in ((2.0, 5), (1.25, 8), (10.0, 4)):
        pipe.enable_cache("ranked", STEPS, target_speedup=speedup)
        assert sum(map(sum, pipe.cache.plan().values())) == computed
        pipe.disable_cache()
    with pytest.raises(ValueError, match=r"skip_rank\['transformer/cond'\] has 5 entries, and the loop has 6 steps"):
        pipe.enable_cache("ranked", 6, skips=2).plan()
    pipe.disable_cache()
