"""Muon for the matrices of a transformer's blocks, AdamW for the rest.

Muon turns the averaged gradient of a matrix into the nearest matrix whose singular values are equal. Scaled as AdamW's
steps are, it takes AdamW's learning rate. Matrices of one shape are one batch, so a step is a few kernels.

Sources: K. Jordan et al., "Muon" (2024); J. Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of Keller Jordan's polynomial: singular values end between 0.7 and 1.2


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Of each of [N, rows, columns] the nearest with equal singular values, roughly, by Newton and Schulz."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    result: Tensor = (x if wide else x.mT).type_as(matrices)
    return result


class Muon(torch.optim.Optimizer):
    """Of matrices alone. The step's root mean square is 0.2 of the learning rate, as AdamW's is about.

    The learning rate is a tensor on the matrices' device: a captured CUDA graph reads what it holds.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: Tensor, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, matrices in shapes.items():
                steps = orthogonalised(self._direction(matrices, group["momentum"]))
                steps *= group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_sub_(matrices, list(steps.unbind()))

    def _direction(self, matrices: list[Tensor], momentum: float) -> Tensor:
        """Nesterov's, [N, rows, columns]."""
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch.stack(gradients).lerp_(torch.stack(averages), momentum)


class MuonAndAdamW:
    """Both, in the shape of one optimizer: each parameter belongs to one of them."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        """Move every parameter."""
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
