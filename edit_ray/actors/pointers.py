"""Where the live runs are, kept for the segment scheduler's next incarnation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from edit_ray.actors.best_effort import best_effort
from edit_ray.actors.pool import ActorPool, Pointer


class Pointers:
    """Every change is remembered by the pool, the latest one last."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self._known: dict[str, Pointer] = {}
        self._remembering = asyncio.Lock()

    def recalled(self, pointers: Mapping[str, Pointer]) -> None:
        """Takes over what an earlier incarnation has left, and keeps it until each run is forgotten."""
        self._known |= pointers

    async def note(self, run_id: str, pointer: Pointer) -> None:
        self._known[run_id] = pointer
        async with self._remembering:
            await self._pool.remember(dict(self._known))

    async def forget(self, run_id: str) -> None:
        """Nothing is left to do for a run."""
        self._known.pop(run_id, None)
        with best_effort(f"note that run {run_id} has ended"):
            async with self._remembering:
                await self._pool.remember(dict(self._known))

    @contextlib.asynccontextmanager
    async def noted(self, run_id: str, pointer: Pointer) -> AsyncIterator[None]:
        """The pointer is there before the run's folder is: from then on the next incarnation goes on with it."""
        try:
            await self.note(run_id, pointer)
            yield
        except BaseException:
            await self.forget(run_id)
            raise
        if not pointer.begun:
            with best_effort(f"note that run {run_id} has begun"):
                await self.note(run_id, replace(self._known[run_id], begun=True))
