"""The actors' plain classes in one process, without Ray: for the library's users, for tests, for comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.messages import GROUP_OF, RunSpec
from edit_ray.actors.pool import NotStarted, Pointer

GROUPS = (*dict.fromkeys(GROUP_OF.values()), "control", "store")


class LocalWorker:
    """A GPU actor and its CacheStore actor, whose calls run in threads of this process."""

    def __init__(self, number: int = 0) -> None:
        self.store = CacheStoreActor(number)
        self.threads = {group: ThreadPoolExecutor(1, group) for group in GROUPS}
        self.denoiser = DenoiserActor(self)

    def call(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """The store as the GPU actor calls it."""
        return self.threads["store"].submit(getattr(self.store, method), *arguments).result

    def end(self) -> None:
        for threads in self.threads.values():
            threads.shutdown(wait=False)
        self.store.close()


class LocalPool:
    """A pool of as many such workers as are asked for."""

    def __init__(self) -> None:
        self.workers: dict[int, LocalWorker] = {}
        self._live: dict[str, Pointer] = {}
        self._targets: dict[str, str] = {}

    async def start(self, spec: RunSpec, worker: int) -> None:
        if worker not in self.workers:
            self.workers[worker] = LocalWorker(worker)

    async def places(self, spec: RunSpec) -> int | None:
        return None

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any:
        of = self._worker(worker)
        threads = of.threads[GROUP_OF.get(method, "control")]
        return await asyncio.get_running_loop().run_in_executor(threads, getattr(of.denoiser, method), *arguments)

    async def store(self, worker: int, method: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(getattr(self._worker(worker).store, method), *arguments)

    async def restart_denoiser(self, worker: int) -> None:
        """What a thread is at cannot be killed: it goes on, and nobody waits for it."""
        self.workers[worker].denoiser = DenoiserActor(self.workers[worker])

    async def restart_store(self, worker: int) -> None:
        """As for the GPU actor: the calls of the old one go on."""
        self.workers[worker].store = CacheStoreActor(worker)

    async def remember(self, live: Mapping[str, Pointer]) -> None:
        self._live = dict(live)

    async def recall(self) -> dict[str, Pointer]:
        return self._live

    async def remember_targets(self, targets: Mapping[str, str]) -> None:
        self._targets = dict(targets)

    async def recall_targets(self) -> dict[str, str]:
        return self._targets

    async def end(self) -> None:
        for worker in self.workers.values():
            worker.end()

    def _worker(self, worker: int) -> LocalWorker:
        if worker not in self.workers:
            raise NotStarted(f"worker {worker} was not started")
        return self.workers[worker]
