"""The CFG gate: late in a loop, "uncond" is "cond" minus what the two have differed by before, and is not computed.

Source: A. Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models" (arXiv
2312.12487), in the form of FastVideo's and SGLang's CFG gating.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from edit_ray.cache.policies.option_types import OptionError

if TYPE_CHECKING:
    from torch import Tensor


def gated_steps(share: float, experts: Sequence[str]) -> list[bool]:
    """Whether each step of a loop leaves "uncond" out, from the expert of each.

    The steps from `share` of them on, except an expert's first one, which has no difference of that expert.
    """
    first = share * len(experts)
    return [step >= first and step > 0 and experts[step - 1] == expert for step, expert in enumerate(experts)]


class CfgGate:
    """Keeps the difference of the latest step that computed both branches, and the latest output of "cond".

    Args:
        share: Of the steps, from the first, that compute both branches; 1 for all of them.

    Raises:
        OptionError: `share` is no number from 0 to 1.
    """

    def __init__(self, share: float) -> None:
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
            raise OptionError(
                "cfg_gate", f"cfg_gate is {share!r}; it must be a number from 0 to 1, the share of the steps before it."
            )
        self.share: float = float(share)
        self.reset()

    def reset(self) -> None:
        """Forget the last call."""
        self._cond: tuple[str, int, Any] | None = None  # expert, step and output
        self._difference: tuple[str, Tensor] | None = None  # expert, and cond - uncond in float32

    def stand_in(self, expert: str, branch: str, step: int, num_steps: int) -> Any:
        """What takes the place of the transformer's output, of the same type; None where it has to be computed."""
        if branch != "uncond" or step < self.share * num_steps or self._cond is None or self._difference is None:
            return None
        if self._cond[:2] != (expert, step) or self._difference[0] != expert:
            return None
        output = self._cond[2]
        uncond = (output[0].float() - self._difference[1]).to(output[0].dtype)
        if isinstance(output, tuple):
            return (uncond, *output[1:])
        return replace(output, **{next(iter(output)): uncond})  # one of diffusers' output classes

    def saw(self, expert: str, branch: str, step: int, output: Any) -> None:
        """Keep what a transformer returned."""
        if branch == "cond":
            self._cond = expert, step, output
        elif branch == "uncond" and self._cond is not None and self._cond[:2] == (expert, step):
            self._difference = expert, self._cond[2][0].float() - output[0].float()
