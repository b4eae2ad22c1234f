"""Bounds what the segment scheduler waits for. An actor that hangs is killed, and Ray restarts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from edit_ray.actors.pool import ActorPool, NoAnswer
from edit_ray.engine.options import EngineOptions
from edit_ray.errors import SegmentFailed

T = TypeVar("T")
CHECKS = 5  # of an actor, within the time that it has for a step or an answer
DISK_THREADS = 8

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Log an error of the block and continue: for statistics, clean-up and notes. The log says "could not `what`"."""
    try:
        yield
    except Exception as error:
        _log.warning("could not %s: %s: %s", what, type(error).__name__, error)


def disk_threads() -> ThreadPoolExecutor:
    """The executor of the event loop. It starts all threads at once; else memory would seem to grow over days."""
    executor, all_there = ThreadPoolExecutor(DISK_THREADS, "waiting"), threading.Barrier(DISK_THREADS)
    for _ in range(DISK_THREADS):
        executor.submit(all_there.wait)
    return executor


async def in_own_thread(work: Callable[..., T], *arguments: object) -> T:
    """The result of work that may take minutes, in a thread that nothing else needs."""
    executor = ThreadPoolExecutor(1, work.__name__)
    done = asyncio.get_running_loop().run_in_executor(executor, work, *arguments)
    executor.shutdown(wait=False)  # the thread ends with the work
    return await done


async def answered(call: Awaitable[T], timeout_s: float, what: str) -> T:
    """The result of a call that returns at once. Raises NoAnswer, a ConnectionError, after `timeout_s`."""
    try:
        return await asyncio.wait_for(call, timeout_s)
    except TimeoutError:
        raise NoAnswer(f"{what} was not answered for {timeout_s:g} s") from None


@dataclass(frozen=True)
class _Beat:
    """A GPU actor's last beat (None while it loads a model), when it was read, and for how long it has been the same.

    The watchdog's process may itself have been stopped: of the time between two checks only a little counts.
    """

    number: int | None
    read_at: float
    lasts_s: float = 0.0

    def again(self, now: float, interval_s: float) -> _Beat:
        return _Beat(self.number, now, self.lasts_s + min(now - self.read_at, 3 * interval_s))


class Watchdog:
    """Watches all work of one pool's GPU actors and stores."""

    def __init__(self, pool: ActorPool) -> None:
        self._pool = pool
        self._last: dict[int, _Beat] = {}  # by worker
        self._answers_by: dict[int, float] = {}  # by worker whose store is silent: when it must have answered

    def started(self, worker: int) -> None:
        """The worker's actors have just answered: a store that hangs from now on has no time left to start in."""
        self._answers_by.pop(worker, None)

    async def watch(self, worker: int, work: Awaitable[T], engine: EngineOptions) -> T:
        """The result of a GPU actor's work.

        Raises SegmentFailed if the GPU actor made no step for `step_timeout_s`, or loaded a model for longer than
        `load_timeout_s`; it was restarted then. A store that does not answer is restarted too, which the work notices.
        """
        task = asyncio.ensure_future(work)
        self._last.pop(worker, None)
        try:
            while True:
                interval_s = min(engine.step_timeout_s, engine.answer_timeout_s) / CHECKS
                done, _ = await asyncio.wait({task}, timeout=interval_s)
                if done:
                    return task.result()
                if await self._store_is_silent(worker, engine):
                    continue  # the GPU actor may be waiting for it
                if why := await self._hangs(worker, engine, interval_s):
                    await self._pool.restart_denoiser(worker)
                    raise SegmentFailed(f"{why}; it was killed")
        finally:
            if not task.done():
                task.cancel()

    async def watch_store(self, worker: int, call: Awaitable[T], engine: EngineOptions) -> T:
        """Await a call to a store, for `step_timeout_s` + `answer_timeout_s` at most, while it answers other calls.

        Raises NoAnswer after that time; ConnectionError if the store stopped answering and was restarted.
        """
        task = asyncio.ensure_future(call)
        try:
            timeout_s = engine.step_timeout_s + engine.answer_timeout_s
            async with asyncio.timeout(timeout_s) as bound:
                while not (await asyncio.wait({task}, timeout=engine.answer_timeout_s / CHECKS))[0]:
                    if await self._store_is_silent(worker, engine):  # Ray takes seconds to kill a stopped process
                        bound.reschedule(asyncio.get_running_loop().time() + timeout_s)
                return task.result()
        except TimeoutError:
            raise NoAnswer(f"the store was not done within {timeout_s:g} s") from None
        finally:
            task.cancel()

    async def _store_is_silent(self, worker: int, engine: EngineOptions) -> bool:
        """Whether the store does not answer now. After `answer_timeout_s` of silence it is restarted."""
        now = asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._pool.store(worker, "describe"), engine.answer_timeout_s / CHECKS)
        except TimeoutError:
            if now <= self._answers_by.setdefault(worker, now + engine.answer_timeout_s):
                return True
            _log.warning("the store %d did not answer for %g s; it is killed", worker, engine.answer_timeout_s)
            await self._pool.restart_store(worker)
            # The new store needs time to start, and the GPU actor's time for a step starts again.
            self._answers_by[worker] = now + engine.start_timeout_s
            self._last.pop(worker, None)
            return True
        except ConnectionError:  # it is gone, which whoever needs it notices
            pass
        self._answers_by.pop(worker, None)
        return False

    async def _hangs(self, worker: int, engine: EngineOptions, interval_s: float) -> str | None:
        """What the GPU actor has not done in time, as a sentence; None if it is alive."""
        now = asyncio.get_running_loop().time()
        last = self._last.setdefault(worker, _Beat(-1, now))
        number = last.number
        try:
            number = await asyncio.wait_for(self._pool.denoiser(worker, "beat"), interval_s)
        except TimeoutError:
            pass
        except ConnectionError:
            return None  # it is gone, which the work notices
        if self._last.get(worker) != last:
            return None  # other work on it has read the beat meanwhile
        beat = self._last[worker] = last.again(now, interval_s) if number == last.number else _Beat(number, now)
        loads = beat.number is None  # an actor beats once its model is loaded
        timeout_s = engine.load_timeout_s if loads else engine.step_timeout_s
        if beat.lasts_s <= timeout_s:
            return None
        self._last.pop(worker, None)  # other work that waits for this actor starts a new count
        if loads:
            return f"the GPU actor was still loading its model after {timeout_s:g} s (engine.load_timeout_s)"
        return f"the GPU actor made no step for {timeout_s:g} s (engine.step_timeout_s)"
