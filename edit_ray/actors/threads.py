"""Threads of the segment scheduler, for waiting: for disks, and for actors to start; the GPU actor's one for torch."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
FOR_DISKS = 8


def disk_threads() -> ThreadPoolExecutor:
    """All threads are there at once: they would come one by one anyway, whenever two happen to be needed together, and
    a run of many days would seem to grow.
    """
    pool, all_there = ThreadPoolExecutor(FOR_DISKS, "waiting"), threading.Barrier(FOR_DISKS)
    for _ in range(FOR_DISKS):
        pool.submit(all_there.wait)
    return pool


async def in_own_thread(work: Callable[..., object], *arguments: object) -> None:
    """Waits for work that may take minutes, in a thread that nothing else needs."""
    pool = ThreadPoolExecutor(1, work.__name__)
    done = asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
    pool.shutdown(wait=False)  # the thread ends with the work
    await done


class OneThread(ThreadPoolExecutor):
    """A thread that does one work after the other; what goes first is done between two steps of what is at work."""

    def __init__(self, name: str) -> None:
        self._first: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._ident = 0
        super().__init__(1, name, self._begin)

    def _begin(self) -> None:
        self._ident = threading.get_ident()

    def submit_first(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._first.append((future, work))
        self.submit(self.give_way)
        return future

    def give_way(self) -> None:
        """Between two steps: do what goes first. On another thread nothing is done."""
        while self._first and threading.get_ident() == self._ident:
            future, work = self._first.popleft()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
