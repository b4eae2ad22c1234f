"""Finds actors that hang, and bounds every call to one. What hangs is killed, and Ray starts it again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from edit_ray.actors.pool import ActorPool, NoAnswer
from edit_ray.engine.options import EngineOptions
from edit_ray.errors import SegmentFailed

T = TypeVar("T")
LOOKS = 5  # at an actor, in the time that it has for a step or an answer

_log = logging.getLogger(__name__)


async def answered(call: Awaitable[T], timeout_s: float, what: str) -> T:
    """What a call gives that is answered at once. Raises NoAnswer, a ConnectionError, after `timeout_s`."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except TimeoutError:
        raise NoAnswer(f"{what} was not answered for {timeout_s:g} s") from None


@dataclass(frozen=True)
class _Beat:
    """The last one of a GPU actor, None while it loads a model; when it was asked for, and how long it is the same.

    A process that was stopped itself must not take that time for the actor's: between two looks little of it counts.
    """

    number: int | None
    asked_at: float
    lasts_s: float = 0.0

    def again(self, now: float, looks_s: float) -> _Beat:
        return _Beat(self.number, now, self.lasts_s + min(now - self.asked_at, 3 * looks_s))


class Watchdog:
    """Looks after all work of one pool: its GPU actors and their stores."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self._last: dict[int, _Beat] = {}  # by worker
        self._answers_by: dict[int, float] = {}  # worker -> when its store, which is silent now, has to have answered

    async def watch(self, worker: int, work: Awaitable[T], engine: EngineOptions) -> T:
        """What the work of a GPU actor gives.

        Raises SegmentFailed where the GPU actor has made no step for `step_timeout_s` meanwhile, or has loaded a model
        for longer than `load_timeout_s`; it was restarted then. A store that does not answer is restarted too: the work
        finds that out.
        """
        task = asyncio.ensure_future(work)
        self._last.pop(worker, None)
        try:
            while True:
                looks = min(engine.step_timeout_s, engine.answer_timeout_s) / LOOKS
                done, _ = await asyncio.wait({task}, timeout=looks)
                if done:
                    return task.result()
                if await self._store_is_silent(worker, engine):
                    continue  # the GPU actor may be waiting for it
                if why := await self._hangs(worker, engine, looks):
                    await self._pool.restart_denoiser(worker)
                    raise SegmentFailed(f"{why}; it was killed")
        finally:
            if not task.done():
                task.cancel()

    async def watch_store(self, worker: int, call: Awaitable[T], engine: EngineOptions) -> T:
        """What a call to a store gives, which takes as long as the store answers other calls, but not for ever.

        Raises ConnectionError where it did not answer, and was restarted; NoAnswer after `step_timeout_s`.
        """
        task = asyncio.ensure_future(call)
        try:
            timeout_s = engine.step_timeout_s + engine.answer_timeout_s
            async with asyncio.timeout(timeout_s) as bound:
                while not (await asyncio.wait({task}, timeout=engine.answer_timeout_s / LOOKS))[0]:
                    if await self._store_is_silent(worker, engine):  # Ray takes seconds to kill what is stopped
                        bound.reschedule(asyncio.get_running_loop().time() + timeout_s)
                return task.result()
        except TimeoutError:
            raise NoAnswer(f"the store was not done within {engine.step_timeout_s:g} s") from None
        finally:
            task.cancel()

    async def _store_is_silent(self, worker: int, engine: EngineOptions) -> bool:
        """Whether the store does not answer now; after `answer_timeout_s` of that it is restarted."""
        now = asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._pool.store(worker, "describe"), engine.answer_timeout_s / LOOKS)
        except TimeoutError:
            if now <= self._answers_by.setdefault(worker, now + engine.answer_timeout_s):
                return True
            _log.warning("the store %d did not answer for %g s; it is killed", worker, engine.answer_timeout_s)
            await self._pool.restart_store(worker)
            # It takes its time to begin, and the GPU actor's time for a step begins anew.
            self._answers_by[worker] = now + engine.start_timeout_s
            self._last.pop(worker, None)
            return True
        except ConnectionError:  # it is gone: whoever needs it says so himself
            pass
        self._answers_by.pop(worker, None)
        return False

    async def _hangs(self, worker: int, engine: EngineOptions, looks_s: float) -> str | None:
        """What the GPU actor has not done in time, as a sentence; None while all is well."""
        now = asyncio.get_running_loop().time()
        last = self._last.setdefault(worker, _Beat(-1, now))
        number = last.number
        try:
            number = await asyncio.wait_for(self._pool.denoiser(worker, "beat"), looks_s)
        except TimeoutError:
            pass
        except ConnectionError:
            return None  # it is gone: the work says so itself
        if self._last.get(worker) != last:
            return None  # other work on it has found out meanwhile
        beat = self._last[worker] = last.again(now, looks_s) if number == last.number else _Beat(number, now)
        loads = beat.number is None  # an actor answers once it has its model
        timeout_s = engine.load_timeout_s if loads else engine.step_timeout_s
        if beat.lasts_s <= timeout_s:
            return None
        self._last.pop(worker, None)  # whoever else waits for this actor begins to count anew
        if loads:
            return f"the GPU actor was still loading its model after {timeout_s:g} s (engine.load_timeout_s)"
        return f"the GPU actor made no step for {timeout_s:g} s (engine.step_timeout_s)"
