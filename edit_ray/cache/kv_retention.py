"""Which earlier chunks the next one attends to: what stays in the window of K/V, and what comes back from a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edit_ray.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WindowState:
    """What a policy sees before a chunk begins; chunks are named by their number, and listed from old to new.

    `held` are on the device, `stored` elsewhere. `places` is the number that may be attended to besides the new chunk,
    `sink` of them the first. `summaries` [heads · head_dim] are the mean keys of chunks, in float32 on the CPU.
    """

    chunk: int
    held: tuple[int, ...]
    stored: tuple[int, ...]
    places: int
    sink: int
    summaries: Mapping[int, Tensor] = field(default_factory=dict)


class RetentionPolicy(ABC):
    """Chooses the chunks that the next one attends to. Other packages register theirs in `edit_ray.retention`."""

    stored_chunks: int = 0
    """How many of the chunks that were not chosen are kept in the store, from where they may be chosen again."""

    @abstractmethod
    def select(self, window: WindowState) -> Sequence[int]:
        """Chunks of `held` and `stored`, at most `places`."""


RETENTIONS: Registry[RetentionPolicy] = Registry("retention policy", "edit_ray.retention")
register_retention = RETENTIONS.register


def make_retention(retention: str | RetentionPolicy) -> RetentionPolicy:
    """The policy of a registered name; a `RetentionPolicy` is returned as it is.

    Raises:
        ValueError: no policy has this name.
        TypeError: it is neither a name nor a policy.
    """
    if isinstance(retention, str):
        return RETENTIONS.find(retention)()
    if not isinstance(retention, RetentionPolicy):
        known = ", ".join(RETENTIONS.names())
        raise TypeError(f"retention is {retention!r}; it must be one of {known}, or a RetentionPolicy object.")
    return retention


@register_retention("window_sink")
class WindowSink(RetentionPolicy):
    """The first chunks stay, the others move on (LongLive: S. Yang et al., 2025)."""

    def select(self, window: WindowState) -> Sequence[int]:
        sink, others = window.held[: window.sink], window.held[window.sink :]
        return (*sink, *others[max(len(others) - (window.places - len(sink)), 0) :])


@register_retention("similar")
class Similar(RetentionPolicy):
    """As `window_sink`, but `retrieved` places are for the older chunks whose mean keys are most like the latest's.

    The idea is that of retrieval over a stream's history; here it shows that old K/V comes back from any store.
    """

    def __init__(self, retrieved: int = 1, stored_chunks: int = 64) -> None:
        self.retrieved, self.stored_chunks = retrieved, stored_chunks

    def select(self, window: WindowState) -> Sequence[int]:
        known = sorted({*window.held, *window.stored})
        sink, others = known[: window.sink], known[window.sink :]
        places = window.places - len(sink)
        if len(others) <= places:
            return known
        near = min(max(places - self.retrieved, 1), places)
        older, recent = others[: len(others) - near], others[len(others) - near :]
        latest = window.summaries[known[-1]]

        def likeness(chunk: int) -> float:
            return float(latest @ window.summaries[chunk] / window.summaries[chunk].norm())

        return (*sink, *sorted(sorted(older, key=likeness)[len(older) - (places - near) :]), *recent)
