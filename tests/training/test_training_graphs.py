"""A step of the transformer's training can be a CUDA graph: `tests/gpu` shows that it then computes the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.random_latents import loop_and_loss
from training.recipe import FULL
from training.step_graph import EAGER_TIMES, StepGraphs

NARROW = replace(FULL, layers=1, heads=1, ffn_dim=32, batch=8)
SIZES = ((2, 2), (2, 2), (2, 4))


class FromHost(TorchDispatchMode):
    """Notes what copies from the host, or waits for the device to know a number or a size."""

    forbidden = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [name for name in self.forbidden if func.overloadpacket.__name__ == name]
        return func(*args, **(kwargs or {}))


def test_a_step_takes_nothing_from_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the text encoder looks whether any token is padding; compiled or captured, it does not.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    loop, loss = loop_and_loss(tmp_path, NARROW, SIZES, "cpu")
    for step in range(len(NARROW.turns)):
        loss(step, 0.0)  # what is made once is there
    for step, turn in enumerate(NARROW.turns):
        with FromHost() as host:
            value = loss(step, 0.0)
        value.backward()
        assert not host.found, turn
    monkeypatch.setattr(loop.optimizer.adamw, "step", lambda: None)  # PyTorch's own, and another one on a CPU
    with FromHost() as host:
        loop._move()
    assert not host.found
    with FromHost() as host:  # it does notice
        torch.ones(2)[0] = 5.0
        torch.tensor([1, 2])
    assert len(host.found) == 2


def test_steps_of_one_kind_are_those_of_one_turn(tmp_path: Path) -> None:
    _, loss = loop_and_loss(tmp_path, NARROW, SIZES, "cpu")
    kinds = [loss.turn(step) for step in range(2 * len(NARROW.turns))]
    assert kinds[: len(NARROW.turns)] == kinds[len(NARROW.turns) :] == list(NARROW.turns)


def test_work_on_a_cpu_is_done_as_it_is() -> None:
    graphs, done = StepGraphs(torch.device("cpu")), []
    for number in range(EAGER_TIMES + 2):
        graphs("kind", lambda: done.append(number))  # noqa: B023
    assert done == [0, 1, 2, 3]
    assert not graphs.graphs
