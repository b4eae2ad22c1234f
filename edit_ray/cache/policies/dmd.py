"""DMD: compute every few steps, and forecast the residual between them by a dynamic mode decomposition.

Source: P. Schmid, "Dynamic mode decomposition of numerical and experimental data" (2010); its use as a forecast of
features is that of cache-dit's `calibrators/dmd.py`, whose decomposition this finds from inner products alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edit_ray.cache.policies.estimates import forecast, read_history, weighted_sum
from edit_ray.cache.policies.intervals import AtIntervals
from edit_ray.cache.policies.option_types import Count, NotNegative, Whole, with_options
from edit_ray.cache.policies.policy import PolicyContext, UnitState, register_policy

if TYPE_CHECKING:
    from torch import Tensor

FEWEST = 4  # residuals: a real mode pair takes two of the three steps between them
NOISE = 1e-4  # of the largest singular value, up to which a mode is noise
_AT_ONCE = 2**20  # elements of a residual


@dataclass(frozen=True)
class Modes:
    """The decomposition of one video's residuals; r modes of n residuals."""

    mixture: npt.NDArray[Any]  # [n, r]: each mode as a sum of the residuals, oldest first
    eigenvalues: npt.NDArray[Any]  # [r]
    amplitudes: npt.NDArray[Any]  # [r], at the newest residual

    def weights(self, k: float) -> npt.NDArray[np.float64]:
        """The weight of each residual [n] in the forecast k distances after the newest, oldest first."""
        modes = self.amplitudes * np.power(self.eigenvalues, k)
        return np.asarray((self.mixture @ modes).real, dtype=np.float64)


def decompose(products: npt.NDArray[np.float64], rank: int, ridge: float) -> Modes:
    """The modes of n equally distant residuals y, oldest first, of which `products` [n, n] are the inner products.

    With X = (y1 … yn-1) = U S V^T, X' = (y2 … yn) and A = U^T X' V S^-1 = W L W^-1: the modes are X' V S^-1 W, the
    eigenvalues L; the amplitudes are those of the sum of modes that is closest to yn. `rank` modes, 0 for those above
    `NOISE`; `ridge` is added to S. Since X^T X = V S² V^T, the products are all that is needed.

    Raises:
        LinAlgError: there are no such modes.
    """
    squares, vectors = np.linalg.eigh(products[:-1, :-1])
    singular = np.sqrt(np.maximum(squares[::-1], 0))
    r = min(rank or max(1, int((singular > NOISE * singular[0]).sum())), len(singular))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        v, singular = vectors[:, ::-1][:, :r], singular[:r]
        scaled = v / (singular + ridge)
        left = v / singular
        eigenvalues, w = np.linalg.eig(left.T @ products[:-1, 1:] @ scaled)
        mixture = np.concatenate([np.zeros((1, r)), scaled @ w])
        squares, vectors = np.linalg.eigh(products)
        root = np.sqrt(np.maximum(squares, 0))[:, None] * vectors.T  # root^T root = products
        amplitudes = np.linalg.lstsq(root @ mixture, root[:, -1].astype(complex), rcond=None)[0]
    return Modes(mixture, eigenvalues.astype(complex), amplitudes)


def inner_products(residuals: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """[B, n, n] of n residuals [B, N, D], in float64; one device synchronisation."""
    import torch  # here, so that a configuration is checked without it

    flat = [residual.flatten(1) for residual in residuals]
    total = torch.zeros(len(flat[0]), len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].shape[1], _AT_ONCE):
        part = torch.stack([each[:, start : start + _AT_ONCE] for each in flat], dim=1).double()
        total += part @ part.mT
    products: npt.NDArray[np.float64] = total.cpu().numpy()
    return products


def equally_distant(computed: Sequence[int]) -> int:
    """How many of the newest computed steps have one distance; newest first."""
    distances = [later - earlier for later, earlier in pairwise(computed)]
    return 1 + sum(1 for _ in takewhile(lambda distance: distance == distances[0], distances))


@register_policy("dmd")
@with_options
class DynamicModes(AtIntervals):
    """Forecasts a unit's residual as a sum of exponentials, from its newest computed residuals at equal distances.

    With fewer than 4 of them it forecasts as `taylorseer`. The mask is known; the weights depend on the residuals, and
    are found once after each computed step, for each video of a batch apart.
    """

    history_size: Whole = Field(default=6, ge=FEWEST, description="Newest computed residuals that are stored and read.")
    rank: Count = Field(default=0, description="Number of modes; 0 for all whose singular value is above the noise.")
    ridge: NotNegative = Field(default=1e-8, description="Added to the singular values before they are inverted.")
    max_order: Count = Field(default=1, description="Of the expansion that forecasts from fewer residuals.")

    def __post_init__(self) -> None:
        self.history_len = max(self.history_size, self.max_order + 1)

    def reset(self, state: UnitState) -> None:
        super().reset(state)
        state.user["fitted"] = None

    def reconstruct(self, ctx: PolicyContext) -> Tensor | None:
        history = read_history(ctx, self.history_len)
        if history is None or ctx.base is None:
            return None
        count = equally_distant([step for step, _ in history[: self.history_size]])
        if count < FEWEST:
            return ctx.base + forecast(history, ctx.step, self.max_order)
        residuals = [residual for _, residual in history[:count]]
        (newest, _), (before, _) = history[:2]
        fitted = ctx.state.user["fitted"]
        if fitted is None or fitted[0] != newest:
            fitted = ctx.state.user["fitted"] = newest, self._fit(residuals)
        return ctx.base + self._sum(residuals, fitted[1], (ctx.step - newest) / (newest - before))

    def _fit(self, residuals: Sequence[Tensor]) -> list[Modes | None]:
        """The modes of each video, None where there are none."""
        found: list[Modes | None] = []
        for products in inner_products(residuals[::-1]):
            try:
                found.append(decompose(products, self.rank, self.ridge))
            except np.linalg.LinAlgError:
                found.append(None)
        return found

    def _sum(self, residuals: Sequence[Tensor], fitted: Sequence[Modes | None], k: float) -> Tensor:
        """The forecast; of a video without finite weights its newest residual."""
        reuse = np.eye(len(residuals))[0]
        with np.errstate(over="ignore", invalid="ignore"):
            each = [reuse if modes is None else modes.weights(k)[::-1] for modes in fitted]
        weights = np.stack([of_video if np.isfinite(of_video).all() else reuse for of_video in each], axis=1)
        if weights.shape[1] == 1:
            return weighted_sum(residuals, weights[:, 0].tolist())
        import torch  # here, so that a configuration is checked without it

        dtype = torch.promote_types(residuals[0].dtype, torch.float32)
        scales = torch.from_numpy(weights).to(residuals[0].device, dtype)
        return weighted_sum(residuals, list(scales[..., None, None]))
