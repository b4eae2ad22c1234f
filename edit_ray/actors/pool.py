"""The other actors as the segment scheduler sees them, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edit_ray.actors.messages import RunSpec


@dataclass(frozen=True)
class Pointer:
    """Where a live run is found: the folder that holds its folder, and the GPU actor that works on it, if one does.

    `begun` says that the run's folder is there; before that it is being made.
    """

    root: str
    worker: int | None = None
    begun: bool = False


class ActorGone(ConnectionError):
    """An actor died, or is being started again."""


class NotStarted(ConnectionError):
    """An actor that this incarnation of the segment scheduler has not started, or found."""


class NoAnswer(ConnectionError):
    """An actor did not answer in time. It may be there, and hang."""


class ActorPool(Protocol):
    """GPU actors, numbered from 0, each with a CacheStore actor beside it.

    A call to an actor that is not there raises ActorGone, to one that nobody asked for NotStarted: both are a
    ConnectionError.
    """

    async def start(self, spec: RunSpec, worker: int) -> None:
        """The two exist, answer and fit this run. Raises ResourcesUnavailable, ActorVersionMismatch, ConfigError.

        Where no node has what they need it is NoPlace.
        """

    async def places(self, spec: RunSpec) -> int | None:
        """How many GPU actors for such a run all nodes hold together, whoever uses them now; None: nobody knows."""

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any: ...
    async def store(self, worker: int, method: str, *arguments: Any) -> Any: ...

    async def restart_denoiser(self, worker: int) -> None:
        """Kills a GPU actor that does not answer; another takes its place."""

    async def restart_store(self, worker: int) -> None:
        """Kills a CacheStore actor that does not answer; another takes its place, and finds what is on disk."""

    async def remember(self, live: Mapping[str, Pointer]) -> None:
        """Keeps where the live runs are for the segment scheduler's next incarnation."""

    async def recall(self) -> dict[str, Pointer]:
        """What was remembered last."""

    async def remember_targets(self, targets: Mapping[str, str]) -> None:
        """Keeps where Prometheus was told to ask: the address by the path of the file that names it."""

    async def recall_targets(self) -> dict[str, str]:
        """What was remembered last."""

    async def end(self) -> None:
        """Ends every actor, this one too."""
