"""Threads of the segment scheduler, which are for waiting: for disks, and for actors to start."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
