"""The actors' plain classes in one process, without Ray: for the library's users, for tests, for comparison."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.messages import GROUP_OF, RunSpec


class LocalCrew:
    """A crew whose calls run in threads of this process."""

    def __init__(self) -> None:
        self._store: CacheStoreActor | None = None
        self._denoiser: DenoiserActor | None = None
        self._threads = {group: ThreadPoolExecutor(1, group) for group in ("denoise", "decode", "control", "store")}

    async def start(self, spec: RunSpec) -> None:
        if self._store is None:
            self._store = CacheStoreActor()
            self._denoiser = DenoiserActor(self)

    async def denoiser(self, method: str, *arguments: Any) -> Any:
        threads = self._threads[GROUP_OF.get(method, "control")]
        return await asyncio.get_running_loop().run_in_executor(threads, getattr(self._denoiser, method), *arguments)

    async def store(self, method: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(getattr(self._store, method), *arguments)

    def call(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """The store as the GPU actor calls it."""
        return self._threads["store"].submit(getattr(self._store, method), *arguments).result

    async def end(self) -> None:
        for threads in self._threads.values():
            threads.shutdown(wait=False)
        if self._store is not None:
            self._store.close()
