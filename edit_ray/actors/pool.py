"""The GPU actors and their CacheStore actors as the segment scheduler calls them, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from edit_ray.actors.messages import RunSpec

LIVE_RUNS, TARGETS = "live_runs", "metrics_targets"  # names of notes


class Pointer(NamedTuple):
    """Where to find a live run: the folder that holds its folder, and the GPU actor that works on it, if one does.

    `begun` says that the run's folder exists; before that it is being created.
    """

    root: str
    worker: int | None = None
    begun: bool = False


class ActorGone(ConnectionError):
    """An actor died, or is being restarted."""


class NotStarted(ConnectionError):
    """This incarnation of the segment scheduler has neither started the actor nor found it."""


class NoAnswer(ConnectionError):
    """An actor did not answer in time. It may be alive and hang."""


class ActorPool(Protocol):
    """GPU actors, numbered from 0, each with a CacheStore actor on the same node.

    A call to an actor that is not there raises ActorGone, one to an actor that was never asked for NotStarted. Both are
    a ConnectionError.
    """

    async def start(self, spec: RunSpec, worker: int) -> None:
        """Ensure that the two actors exist, answer and fit this run.

        Raises ResourcesUnavailable, ActorVersionMismatch, ConfigError; NoPlace where no node has the resources.
        """

    async def places(self, spec: RunSpec) -> int | None:
        """How many GPU actors for such a run all nodes hold together, in use or free; None if that is unknown."""

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any: ...
    async def store(self, worker: int, method: str, *arguments: Any) -> Any: ...

    async def restart_denoiser(self, worker: int) -> None:
        """Kill a GPU actor that does not answer, and start another in its place."""

    async def restart_store(self, worker: int) -> None:
        """Kill a CacheStore actor that does not answer, and start another, which finds what is on disk."""

    async def remember(self, values: Mapping[str, Any], note: str = LIVE_RUNS) -> None:
        """Replace a note, a JSON object that outlives the segment scheduler."""

    async def recall(self, note: str = LIVE_RUNS) -> dict[str, Any]:
        """The note as it was written last; empty if it never was."""

    async def end(self) -> None:
        """End every actor, the caller included."""
