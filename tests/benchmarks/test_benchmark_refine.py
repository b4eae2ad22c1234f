"""The second pass of the benchmark `refine`: its interpolation, and that it repeats a pass of known steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.refine import Passes, every, interpolation, rebuilt
from edit_ray.testing import save_random_wan
from tests.calls import TINY, load


@given(st.sets(st.integers(0, 20), min_size=4, max_size=8), st.integers(1, 19), st.integers(1, 2))
def test_interpolation_is_exact_on_polynomials_of_its_degree(known, step, neighbours):
    known = sorted(known)
    if step in known or not known[0] < step < known[-1]:
        return
    weights = interpolation(known, step, neighbours)
    for degree in range(len(weights)):
        assert sum(w * at**degree for at, w in weights.items()) == pytest.approx(step**degree, rel=1e-6, abs=1e-6)
    before, after = [at for at in weights if at < step], [at for at in weights if at > step]
    assert before == [at for at in known if at < step][-neighbours:]
    assert after == [at for at in known if at > step][:neighbours]


def test_every_has_both_ends():
    assert every(3, 8) == [True, True, False, True, False, False, True, True]


def test_a_second_pass_over_all_steps_is_the_first(tmp_path):
    pipe = load(save_random_wan(tmp_path / "wan"), device="cpu")
    call = {name: TINY[name] for name in ("height", "width", "num_frames", "max_sequence_length")}
    passes = Passes(pipe, {**call, "num_inference_steps": 6})
    frames, _, anchors = passes.first("a red circle", 3, mask=[True] * 6)
    assert {branch: list(steps) for branch, steps in anchors.items()} == {branch: list(range(6)) for branch in anchors}
    again, _ = passes.second("a red circle", 3, anchors, 1)
    torch.testing.assert_close(again, frames, rtol=1e-4, atol=1e-4)
    assert torch.equal(rebuilt(anchors["cond"], 2, 1), anchors["cond"][2])
    skipped, _, fewer = passes.first("a red circle", 3, mask=[True, True, False, True, True, True])
    assert 2 not in fewer["uncond"]
    expected = (fewer["cond"][1] + fewer["cond"][3]) / 2
    torch.testing.assert_close(rebuilt(fewer["cond"], 2, 1), expected)
    assert not torch.equal(skipped, frames)
