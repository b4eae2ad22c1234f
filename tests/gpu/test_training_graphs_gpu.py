"""Steps of the transformer's training compute as CUDA graphs what they compute without."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.random_latents import loop_and_loss
from training.recipe import FULL
from training.step_graph import EAGER_TIMES, StepGraphs

# The sizes of the full recipe's latents, blocks and text: what is compiled for them is what training will need.
WIDE = replace(FULL, layers=2)
SIZES = ((16, 16), (16, 16), (12, 20))


@pytest.fixture(autouse=True)
def _matmuls_as_in_training():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_graphs_compute_what_steps_do(tmp_path: Path) -> None:
    loop, loss = loop_and_loss(tmp_path, WIDE, SIZES, "cuda")
    graphs = StepGraphs(loop.device)
    for turn in dict.fromkeys(WIDE.turns):
        step = WIDE.turns.index(turn)

        def work() -> None:
            loop._differentiate(lambda _, progress: loss(step, progress), 0.0)  # noqa: B023

        outcomes = []
        for _ in range(EAGER_TIMES + 2):  # the last two are graphs
            torch.cuda.manual_seed(7)
            loop.gradient.zero_()
            graphs(turn, work)
            outcomes.append((loop.value.item(), loop.gradient.clone()))
        assert turn in graphs.graphs
        (value, gradient), *others = outcomes
        assert gradient.norm() > 0
        for other_value, other in others:
            assert abs(other_value - value) < 1e-3 * value, turn
            assert (other - gradient).norm() < 2e-2 * gradient.norm(), turn
        torch.cuda.manual_seed(8)
        graphs(turn, work)
        assert loop.value.item() != value, "a graph draws anew"
        kept = loss.clips[turn[0]].latents.clone()
        loss.clips[turn[0]].latents.zero_()
        torch.cuda.manual_seed(7)
        graphs(turn, work)
        assert abs(loop.value.item() - value) > 1e-2 * value, "a graph sees clips that were renewed"
        loss.clips[turn[0]].latents.copy_(kept)


def test_a_loop_of_graphs_ends_where_one_without_does(tmp_path: Path) -> None:
    turns = WIDE.turns[:3]
    weights = []
    for graphs in (False, True):
        recipe = replace(WIDE, turns=turns, graphs=graphs, warmup_steps=5, agree_every_steps=1)
        loop, loss = loop_and_loss(tmp_path / str(graphs), recipe, SIZES, "cuda")
        torch.cuda.manual_seed(7)
        before = torch.cat([parameter.detach().flatten() for parameter in loop.parameters])

        def until(step: int) -> None:
            if step == 20:
                loop.budget_s = 0.0  # noqa: B023

        loop.run(loss, loss.turn, until)
        assert 20 <= loop.step <= 22
        moved = torch.cat([average.flatten() for average in loop.averaged]) - before
        weights.append(moved)
    one, other = weights
    assert (one - other).norm() < 0.1 * one.norm()
