"""The actors on Ray: their names, resources, placement, start, restart and end. All Ray options are set here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import cache, partialmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import PlacementGroupID
from ray._private.state import state
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from edit_ray.actors.connection import NAMESPACE as NAMESPACE
from edit_ray.actors.messages import GROUP_OF, RunSpec, code_version
from edit_ray.actors.pool import LIVE_RUNS, TARGETS, ActorGone, NotStarted
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.actors.watchdog import in_own_thread
from edit_ray.config import Config
from edit_ray.engine.model_info import dtype_problem
from edit_ray.errors import ActorVersionMismatch, ConfigError, NoPlace, ResourcesUnavailable
from edit_ray.metrics.exporter import remove_targets

SCHEDULER, DENOISER, CACHE_STORE = "segment_scheduler", "denoiser", "cache_store"
PLACEMENT = "edit_ray_worker"
SCHEDULER_RESOURCE = "edit_ray_scheduler"  # of the nodes that may run the segment scheduler; without any, all may
RESTART_TIMEOUT_S = 60.0  # of the segment scheduler
END_TIMEOUT_S = 60.0  # for Ray to end actors
CHECKS = 5  # whether the segment scheduler answers, within the time that it has for an answer
_ENDED_S = 0.3

_log = logging.getLogger(__name__)
_DETACHED = {"namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
_DIED = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)  # the latter if Ray's memory monitor killed it


def segment_scheduler(answer_timeout_s: float) -> Any:
    """The handle of the one segment scheduler, started if there is none.

    One that answers nothing for `answer_timeout_s` is killed and restarted. Raises ActorVersionMismatch when it runs
    other code than this process.
    """
    needs = {SCHEDULER_RESOURCE: 0.001} if SCHEDULER_RESOURCE in ray.cluster_resources() else {}
    patience_s = math.inf if find_segment_scheduler() is None else answer_timeout_s
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, resources=needs)(SegmentSchedulerActor)
    handle = actor.options(name=SCHEDULER, **_DETACHED).remote(RayPool())
    deadline = time.monotonic() + RESTART_TIMEOUT_S + (patience_s if patience_s < math.inf else 0.0)
    _described(SCHEDULER, handle, deadline, patience_s)
    return handle


def find_segment_scheduler() -> Any | None:
    """The handle of the segment scheduler, if it is alive."""
    try:
        return ray.get_actor(SCHEDULER, namespace=NAMESPACE)
    except ValueError:
        return None


def answer_of(handle: Any, call: Any, answer_timeout_s: float) -> Any:
    """The answer to a call of the segment scheduler, however long it takes, while the scheduler answers other calls.

    A scheduler that answers nothing for `answer_timeout_s` is killed and restarted; then this raises RayActorError. The
    time is counted in checks, so that a caller that was itself stopped for a while kills nothing.
    """
    silent, question = 0, None
    while not ray.wait([call], timeout=answer_timeout_s / CHECKS)[0]:
        if question is not None and ray.wait([question], timeout=0)[0]:
            silent, question = 0, None
        elif question is not None:
            silent += 1
        if silent == CHECKS:
            _log.warning("the segment scheduler did not answer for %g s; it is killed", answer_timeout_s)
            ray.kill(handle, no_restart=False)
            silent, question = 0, None
        question = question or handle.describe.remote()
    return ray.get(call)


def end_actors(within: bool = False) -> list[str]:
    """End all our actors in this Ray; returns the names of those that were alive.

    The segment scheduler ends first, as it restarts the others; if the caller is the scheduler (`within`), last. Raises
    ResourcesUnavailable if Ray does not end them.
    """
    ended: list[str] = []
    deadline = time.monotonic() + END_TIMEOUT_S
    while names := _actor_names():
        if time.monotonic() > deadline:
            raise ResourcesUnavailable(
                f"Ray has not ended {', '.join(names)} within {END_TIMEOUT_S:g} s; try again, or end Ray: `ray stop`"
            )
        for name in sorted(names, key=lambda name: (name == SCHEDULER) == within):
            with contextlib.suppress(ValueError):
                handle = ray.get_actor(name, namespace=NAMESPACE)
                if name == SCHEDULER:
                    _forget_everything()
                ray.kill(handle)
                ended.append(name)
        time.sleep(_ENDED_S)  # for what the segment scheduler started last to appear
    return list(dict.fromkeys(ended))


def _forget_everything() -> None:
    """Free the actors' resources, forget their runs, and remove what tells Prometheus to scrape them."""
    for group in _placements().values():
        remove_placement_group(group)
    for path, address in _read_note(TARGETS).items():
        remove_targets(Path(path), address)
    for note in (LIVE_RUNS, TARGETS):
        internal_kv._internal_kv_del(note, namespace=NAMESPACE)


class LazyActor:
    """An actor whose plain class is imported in the actor's own process.

    Torch and diffusers take seconds to import and hundreds of megabytes. The segment scheduler starts these actors and
    must itself restart at once, so it imports neither.
    """

    home: ClassVar[str]

    def __init__(self, *arguments: Any) -> None:
        self._plain = getattr(import_module(self.home), type(self).__name__)(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the plain class."""
        return getattr(self._plain, method)(*arguments)

    def describe(self) -> dict[str, str | int]:
        description: dict[str, str | int] = self._plain.describe()
        return description


@cache
def lazy_actor(role: str) -> type[LazyActor]:
    """The class that Ray starts for a role, under the name of the class that it wraps: Ray shows that name."""
    name = {DENOISER: "DenoiserActor", CACHE_STORE: "CacheStoreActor"}[role]
    return type(name, (LazyActor,), {"home": f"edit_ray.actors.{role}"})


class RayPool:
    """The `ActorPool` of this Ray cluster, as the segment scheduler uses it."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._starting: dict[int, asyncio.Lock] = {}

    async def start(self, spec: RunSpec, worker: int) -> None:
        async with self._starting.setdefault(worker, asyncio.Lock()):  # two would each create a placement group
            try:
                await in_own_thread(self._start, spec, worker)
            except _DIED as lost:
                raise ActorGone(f"an actor died while it was started: {type(lost).__name__}") from None

    async def places(self, spec: RunSpec) -> int | None:
        return await asyncio.to_thread(_places, _resources(spec.config))

    async def _call(self, role: str, worker: int, method: str, *arguments: Any) -> Any:
        name, options = name_of(role, worker), {"name": f"{lazy_actor(role).__name__}.{method}"}
        if role == DENOISER:
            options["concurrency_group"] = GROUP_OF.get(method, "control")
        try:
            return await self._handle(name).call.options(**options).remote(method, *arguments)
        except _DIED as lost:
            raise _gone(name, lost) from None

    async def _restart(self, role: str, worker: int) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.to_thread(ray.kill, self._handle(name_of(role, worker)), no_restart=False)

    denoiser, store = partialmethod(_call, DENOISER), partialmethod(_call, CACHE_STORE)
    restart_denoiser, restart_store = partialmethod(_restart, DENOISER), partialmethod(_restart, CACHE_STORE)

    # The notes live in Ray's key-value store, for as long as they are of use: the cluster restarts the segment
    # scheduler, and without the cluster there are no actors either, and `--resume` names the run.
    async def remember(self, values: Mapping[str, Any], note: str = LIVE_RUNS) -> None:
        await asyncio.to_thread(internal_kv._internal_kv_put, note, json.dumps(dict(values)), namespace=NAMESPACE)

    async def recall(self, note: str = LIVE_RUNS) -> dict[str, Any]:
        return await asyncio.to_thread(_read_note, note)

    async def end(self) -> None:
        await asyncio.to_thread(end_actors, within=True)

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            raise NotStarted(f"the actor {name!r} was not started")
        return self._handles[name]

    def _start(self, spec: RunSpec, worker: int) -> None:
        deadline = time.monotonic() + spec.config.engine.start_timeout_s
        resources = _resources(spec.config)
        gpus = resources.get("GPU", 0)
        place = name_of(PLACEMENT, worker)
        found = _placements().get(place)
        group = found or placement_group([resources], name=place, lifetime="detached")
        alive = _actor_names()
        groups = {**dict.fromkeys(GROUP_OF.values(), 1), "control": 4}
        try:
            _await_placement(group, resources, deadline)
            store = _find_or_start(CACHE_STORE, worker, group, worker, num_cpus=0, max_concurrency=4)
            denoiser = _find_or_start(
                DENOISER, worker, group, StoreCalls(store), num_cpus=1, num_gpus=gpus, concurrency_groups=groups
            )
        except ResourcesUnavailable:
            if found is None:  # else other runs' actors may live there, and only this caller's time was too short
                remove_placement_group(group)
            raise
        for role, handle in ((CACHE_STORE, store), (DENOISER, denoiser)):
            name = name_of(role, worker)
            patience_s = spec.config.engine.answer_timeout_s if name in alive else math.inf
            description = _described(name, handle, deadline, patience_s)
        if gpus > int(description["gpus"]):
            raise ResourcesUnavailable(
                f"this run asks for {gpus} GPUs (model.device, engine.cfg_parallel), and the living GPU actor has "
                f"{description['gpus']}; run `edit-ray down` first"
            )
        if problem := dtype_problem(spec.config.model.torch_dtype, "cuda" if gpus else "cpu"):
            raise ConfigError([f"model.torch_dtype {problem}"])
        self._handles |= {name_of(CACHE_STORE, worker): store, name_of(DENOISER, worker): denoiser}


class StoreCalls:
    """The CacheStore actor as the GPU actor calls it: each call starts at once, its reply is a function that waits."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *arguments: Any) -> Callable[[], Any]:
        reference = self._handle.call.remote(method, *arguments)

        def reply() -> Any:
            try:
                return ray.get(reference)
            except _DIED as lost:
                raise _gone(CACHE_STORE, lost) from None

        return reply


def name_of(role: str, worker: int) -> str:
    """The name of a GPU actor, of the CacheStore actor beside it, or of their placement group."""
    return role if worker == 0 else f"{role}-{worker}"


def _actor_names() -> list[str]:
    """The names of our living actors."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]


def _placements() -> dict[str, PlacementGroup]:
    """Our placement groups by name, in whichever namespace they were created."""
    return {
        group["name"]: PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
        for group_id, group in placement_group_table().items()
        if str(group["name"]).startswith(PLACEMENT) and group["state"] != "REMOVED"
    }


def _read_note(note: str) -> dict[str, Any]:
    """A note that `RayPool.remember` wrote; empty if there is none."""
    values: dict[str, Any] = json.loads(internal_kv._internal_kv_get(note, namespace=NAMESPACE) or "{}")
    return values


def _described(name: str, handle: Any, deadline: float, patience_s: float) -> dict[str, Any]:
    """The actor's description of itself, waited for while it starts or restarts, until `deadline` (monotonic seconds).

    An actor that is alive and answers nothing for `patience_s` is killed and restarted. Raises ResourcesUnavailable,
    and ActorVersionMismatch if the actor runs other code than this process.
    """
    while (left := deadline - time.monotonic()) > 0:
        try:
            description: dict[str, Any] = ray.get(handle.describe.remote(), timeout=min(left, patience_s))
            if description["version"] == code_version():
                return description
            raise ActorVersionMismatch(
                f"the living actor {name!r} runs edit_ray {description['version']}, this process {code_version()}; "
                "end the old actors with `edit-ray down`, then start again"
            )
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.2)
        except ray.exceptions.GetTimeoutError:
            alive = state.actor_table(handle._actor_id.hex()).get("State") == "ALIVE"
            if alive and patience_s < math.inf:
                _log.warning("the actor %r did not answer for %g s; it is killed", name, patience_s)
                ray.kill(handle, no_restart=False)
    raise ResourcesUnavailable(f"the actor {name!r} did not answer in time (engine.start_timeout_s)")


def _find_or_start(role: str, worker: int, group: PlacementGroup, *arguments: Any, **options: Any) -> Any:
    actor = ray.remote(max_restarts=-1, **options)(lazy_actor(role))
    strategy = PlacementGroupSchedulingStrategy(group)
    return actor.options(name=name_of(role, worker), scheduling_strategy=strategy, **_DETACHED).remote(*arguments)


def _gone(name: str, lost: Exception) -> ActorGone:
    return ActorGone(f"the actor {name!r} is gone: {type(lost).__name__}")


def _resources(config: Config) -> dict[str, int]:
    """What a GPU actor for such a run reserves on its node."""
    device = config.model.device
    has_one = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    gpus = 2 if config.engine.cfg_parallel else int(has_one)
    return {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}


def _places(resources: dict[str, int]) -> int | None:
    """How many times all nodes together hold these resources; None if an autoscaler may add nodes."""
    if state.get_cluster_config() is not None:
        return None
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(has.get(name, 0) // number) for name, number in resources.items()) for has in alive)


def _await_placement(group: PlacementGroup, resources: dict[str, int], deadline: float) -> None:
    """Wait for the worker's resources. Raises NoPlace with what is needed and what is free."""
    if not group.wait(max(0.0, deadline - time.monotonic())):
        has, free = ray.cluster_resources(), ray.available_resources()
        lines = [
            f"{name}: {n} needed, {free.get(name, 0):g} free of {has.get(name, 0):g}" for name, n in resources.items()
        ]
        raise NoPlace(
            f"the GPU actor found no place in this Ray cluster within engine.start_timeout_s ({'; '.join(lines)}); "
            "free or add resources, or choose another model.device"
        )
