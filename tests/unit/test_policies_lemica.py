"""LeMiCa: the path is the best of all, its errors are measured on the final latents, and a calibration holds them."""

import json
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edit_ray.cache.policies import LeMiCa, make_policy
from edit_ray.cache.policies.lemica import minimax_path
from edit_ray.cli import main
from edit_ray.engine.calibration import FILE_NAME
from edit_ray.testing import save_random_wan
from edit_ray.tuning import rank
from edit_ray.tuning.rank import SkipMeasure
from tests.calls import cached, load
from tests.unit.policy_unit import Unit

STEPS = 6
CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "guidance_scale": 4.0}

pytestmark = pytest.mark.usefixtures("one_thread")


def every_path(errors, computed):
    """Each path of that many computed steps with its errors, largest first."""
    last = len(errors) - 1
    for between in combinations(range(1, last), computed - 2):
        path = [0, *between, last]
        gaps = [(step, following - step - 1) for step, following in pairwise(path)]
        if all(gap <= len(errors[step]) for step, gap in gaps):
            yield sorted((errors[step][gap - 1] if gap else 0.0 for step, gap in gaps), reverse=True), path


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(2, 9))
def test_the_path_is_the_lexicographic_minimax_of_all(data, num_steps):
    error = st.integers(0, 5).map(float)  # few values, so that the largest ones are often equal
    errors = data.draw(st.lists(st.lists(error, max_size=4), min_size=num_steps, max_size=num_steps))
    skips = data.draw(st.integers(-1, num_steps))
    allowed = [min(every_path(errors, computed), default=None) for computed in range(2, num_steps + 1)]
    wanted = max(2, num_steps - max(0, skips))
    assert minimax_path(errors, skips) == next(found for found in allowed[wanted - 2 :] if found)[1]


def test_a_late_step_is_kept_for_a_smaller_second_error():
    errors = [[3.0, 4.0], [5.0], [2.0], [1.0], []]
    assert minimax_path(errors, 2) == [0, 2, 4]
    assert minimax_path(errors, 1) == [0, 1, 2, 4]
    assert minimax_path(errors, 99) == [0, 2, 4]
    assert minimax_path([[]], 1) == [0]


def test_units_of_both_branches_follow_the_path():
    policy = LeMiCa(reuse_error=[[3.0, 4.0], [5.0], [2.0], [1.0], []], skips=2)
    for branch in ("cond", "uncond"):
        assert Unit(policy, 5, branch=branch).mask() == [True, False, True, False, True]


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    return load(save_random_wan(tmp_path_factory.mktemp("two"), two_experts=True, boundary_ratio=0.8), device="cpu")


def test_an_error_is_what_one_reuse_alone_does_to_the_latents(two_experts):
    measure = SkipMeasure(two_experts, ["a red circle", "a blue square"], 3, CALL)
    experts = measure._experts
    reuses = measure.reuses()
    assert (0, 1) in reuses
    for step, count in reuses:
        assert len({experts[at] for at in range(step, step + count + 1)}) == 1
        assert step + count < STEPS - 1
    step, count = reuses[0]

    def made(prompt, seed, mask=None):
        call = CALL | {"prompt": prompt, "output_type": "latent", "return_dict": False}
        generator = torch.Generator().manual_seed(seed)
        if mask is None:
            return two_experts(**call, generator=generator)[0]
        with cached(two_experts, "schedule", STEPS, mask=mask):
            return two_experts(**call, generator=generator)[0]

    mask = [not step < at <= step + count for at in range(STEPS)]
    given_ = [("a red circle", 3), ("a blue square", 4)]
    errors = [(made(*of, mask) - made(*of)).abs().mean().item() for of in given_]
    assert measure.error(measure.reused(step, count)) == pytest.approx(sum(errors) / 2, rel=1e-3)


def test_calibrating_measures_every_reuse_and_the_policy_uses_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rank, "LONGEST_REUSE", 2)
    folder = save_random_wan(tmp_path / "wan")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {folder}, device: cpu}}\n"
        f"sampling: {{height: 32, width: 32, num_frames: 5, num_inference_steps: {STEPS}, guidance_scale: 4.0}}\n"
        "video: {num_segments: 1}\nprompt_segments: [{segment: 0, prompt: a red circle}]\n"
    )
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    file = folder / FILE_NAME
    names = {"--config": tmp_path / "run.yaml", "--prompts": tmp_path / "prompts.txt", "--file": file}
    arguments = [str(part) for pair in names.items() for part in pair]
    assert main(["calibrate", "--policy", "lemica", *arguments]) == 0
    measured = json.loads(file.read_text())["policies"]["lemica"]["reuse_error"]
    assert list(map(len, measured)) == [2, 2, 2, 1, 0, 0]
    assert all(error > 0 for row in measured for error in row)
    assert "7 of 7: 1 steps reuse step 3" in capsys.readouterr().err
    pipe = load(folder)
    for skips in (1, 3):
        with cached(pipe, "lemica", STEPS, skips=skips) as cache:
            path = minimax_path(measured, skips)
            assert cache.plan()["transformer", "cond", 0] == tuple(step in path for step in range(STEPS))
    with cached(pipe, "lemica", STEPS, target_speedup=1.5) as cache:
        assert cache.policy.skips == 2
    assert make_policy("lemica", {"reuse_error": measured}).skips == 3
