"""The place of a forward in its denoising loop: what is known before the loop, and what has to be counted."""

from typing import NamedTuple

from torch import Tensor


class LoopStep(NamedTuple):
    """A denoising step as it is known before the loop: its expert, timestep [] and sigma."""

    expert: str
    timestep: Tensor
    sigma: float | None = None


class Position(NamedTuple):
    """A forward's place in the loop, from its `cache_context`."""

    branch: str
    step: int | None  # None where the pipeline does not say it
    sigma: float | None


class StepCounter:
    """The step of a forward in pipelines that name only the branch, such as diffusers' `WanImageToVideoPipeline`.

    It is exact for loops that call each branch once a step, at noise levels that never rise and whose first one comes
    once: so do diffusers' with all their noise schedulers.
    """

    def __init__(self) -> None:
        self._step, self._timestep = -1, 0.0
        self._branches: set[str] = set()  # those that the present step has called

    def step(self, branch: str, timestep: float, num_steps: int) -> int:
        """The step from 0 of a loop of `num_steps` that calls `branch` at `timestep`.

        Raises:
            ValueError: the loop has more steps.
        """
        again = branch in self._branches and timestep == self._timestep
        if self._step < 0 or timestep > self._timestep or (again and self._step == 0):
            self._step, self._branches = 0, set()
        elif again or timestep < self._timestep:
            self._step, self._branches = self._step + 1, set()
        if self._step >= num_steps:
            self._step = -1
            raise ValueError(f"The loop has more steps than the {num_steps} that the cache was enabled for.")
        self._timestep = timestep
        self._branches.add(branch)
        return self._step
