"""What one forward shows to the policies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor


class StepSignals:
    """Implements `policies.Signals`. The embeddings are made and brought to the CPU when first asked for.

    That is at most one device synchronisation a forward, however many units ask.
    """

    def __init__(self, embed: Callable[[], tuple[Tensor, Tensor]], latents: Tensor | None, sigma: float | None) -> None:
        self._embed, self.latents, self.sigma = embed, latents, sigma

    @property
    def e(self) -> Tensor:
        """See `Signals`."""
        return self._embedded[0]

    @property
    def e0(self) -> Tensor:
        """See `Signals`."""
        return self._embedded[1]

    @cached_property
    def _embedded(self) -> tuple[Tensor, Tensor]:
        e, e0 = self._embed()
        return e.cpu(), e0.cpu()
