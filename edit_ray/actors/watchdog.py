"""Finds GPU actors that hang: at work, and for too long without a step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from edit_ray.actors.crew import Crew
from edit_ray.errors import SegmentFailed

T = TypeVar("T")
LOOKS = 5  # at an actor, in the time that it has for a step


class Watchdog:
    """Looks after all work of one crew."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._last: dict[int, tuple[int, float]] = {}  # worker -> its last beat, and when it was new

    async def watch(self, worker: int, work: Awaitable[T], step_timeout_s: float) -> T:
        """What the work gives.

        Raises SegmentFailed where the GPU actor has made no step for `step_timeout_s` meanwhile; it was restarted then.
        """
        task = asyncio.ensure_future(work)
        self._last.pop(worker, None)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=step_timeout_s / LOOKS)
                if done:
                    return task.result()
                if await self._silent(worker, step_timeout_s):
                    await self._crew.restart_denoiser(worker)
                    raise SegmentFailed(
                        f"the GPU actor made no step for {step_timeout_s:g} s (engine.step_timeout_s); it was killed"
                    )
        finally:
            if not task.done():
                task.cancel()

    async def _silent(self, worker: int, step_timeout_s: float) -> bool:
        beat: int | None = None
        answered = True
        try:
            beat = await asyncio.wait_for(self._crew.denoiser(worker, "beat"), step_timeout_s / LOOKS)
        except TimeoutError:
            answered = False
        except ConnectionError:
            return False  # it is gone: the work says so itself
        now = asyncio.get_running_loop().time()
        if answered and beat is None:
            self._last.pop(worker, None)  # it loads a model, which takes as long as it takes
            return False
        before, since = self._last.setdefault(worker, (-1 if beat is None else beat, now))
        if beat is not None and beat != before:
            self._last[worker] = (beat, now)
            return False
        if now - since <= step_timeout_s:
            return False
        del self._last[worker]  # whoever else waits for this actor begins to count anew
        return True
