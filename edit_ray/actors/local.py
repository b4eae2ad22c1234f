"""The actors' plain classes in one process, without Ray: for users of the library, for tests, for comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.messages import GROUP_OF, RunSpec
from edit_ray.actors.pool import LIVE_RUNS, ActorGone, NotStarted


class LocalWorker:
    """A GPU actor and its CacheStore actor, whose calls run in threads of this process."""

    def __init__(self, number: int = 0) -> None:
        self.store = CacheStoreActor(number)
        self.threads = {group: ThreadPoolExecutor(1, group) for group in {*GROUP_OF.values(), "control", "store"}}
        self.denoiser = DenoiserActor(self)

    def call(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Call the store as the GPU actor does."""
        return self.threads["store"].submit(getattr(self.store, method), *arguments).result

    def end(self) -> None:
        for threads in self.threads.values():
            threads.shutdown(wait=False)
        self.store.close()


class LocalPool:
    """An `ActorPool` of local workers, each created when it is first started."""

    def __init__(self) -> None:
        self.workers: dict[int, LocalWorker] = {}
        self._notes: dict[str, dict[str, Any]] = {}

    async def start(self, spec: RunSpec, worker: int) -> None:
        if worker not in self.workers:
            self.workers[worker] = LocalWorker(worker)

    async def places(self, spec: RunSpec) -> int | None:
        return None

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any:
        of = self._worker(worker)
        threads, called = of.threads[GROUP_OF.get(method, "control")], of.denoiser
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, getattr(called, method), *arguments)
        finally:
            if of.denoiser is not called:
                raise ActorGone(f"the GPU actor of worker {worker} is gone")

    async def store(self, worker: int, method: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(getattr(self._worker(worker).store, method), *arguments)

    async def restart_denoiser(self, worker: int) -> None:
        """Replace the GPU actor. Its running calls cannot be killed: they continue to their end and raise ActorGone."""
        self.workers[worker].denoiser = DenoiserActor(self.workers[worker])

    async def restart_store(self, worker: int) -> None:
        """Replace the store. Calls to the old one continue."""
        self.workers[worker].store = CacheStoreActor(worker)

    async def remember(self, values: Mapping[str, Any], note: str = LIVE_RUNS) -> None:
        self._notes[note] = dict(values)

    async def recall(self, note: str = LIVE_RUNS) -> dict[str, Any]:
        return self._notes.get(note, {})

    async def end(self) -> None:
        for worker in self.workers.values():
            worker.end()

    def _worker(self, worker: int) -> LocalWorker:
        if worker not in self.workers:
            raise NotStarted(f"worker {worker} was not started")
        return self.workers[worker]
