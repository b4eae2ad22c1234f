"""A CacheStore actor in a process of its own: its class without Ray, or the actor itself."""

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from edit_ray.actors.cache_store import CacheStoreActor
from edit_ray.tiers.leases import Reply, Store


def serve(connection: Connection) -> None:
    """The store process: answer calls to a CacheStore actor's class until the other end is closed."""
    actor = CacheStoreActor()
    answer: tuple[Any, Exception | None]
    with suppress(EOFError):
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(actor, method)(*arguments), None
            except Exception as error:
                answer = None, error
            connection.send(answer)
    actor.close()


class AnyStore(Store, Protocol):
    """A CacheStore actor's class, wherever it runs."""

    @property
    def pid(self) -> int: ...

    def close(self) -> None: ...


class StoreProcess:
    """A CacheStore actor in a process of its own, as `SegmentLeases` calls it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Reply:
        """The answer is there when this returns: no call of the store's waits for another."""
        self._connection.send((method, arguments))
        answer, error = self._connection.recv()

        def reply() -> Any:
            if error is not None:
                raise error
            return answer

        return reply

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()
        self._process.close()


class RayStore:
    """The CacheStore actor on a Ray of its own, as the GPU actor calls it."""

    def __init__(self) -> None:
        import ray  # here, as the other one needs none

        from edit_ray.actors import launch

        self._ray = ray
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 4}
        actor: Any = ray.remote(**options)(launch.lazy_actor(launch.CACHE_STORE))
        self._actor = actor.remote()
        self.pid: int = ray.get(self._actor.describe.remote())["pid"]
        self._calls = launch.StoreCalls(self._actor)

    def call(self, method: str, *arguments: Any) -> Reply:
        """Under way at once; what is returned waits for the answer."""
        return self._calls.call(method, *arguments)

    def close(self) -> None:
        """End the actor and its Ray."""
        self._ray.get(self._actor.call.remote("close"))
        self._ray.shutdown()
