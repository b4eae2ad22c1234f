"""How the actors become Ray actors: names, options, placement, start and end. All of Ray's options stand here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import PlacementGroupID
from ray._private.authentication import authentication_token_setup as ray_token
from ray._private.state import state
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.experimental import internal_kv
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from edit_ray.actors.address import check_address
from edit_ray.actors.messages import GROUP_OF, RunSpec, code_version
from edit_ray.actors.pool import ActorGone, NotStarted, Pointer
from edit_ray.actors.segment_scheduler import SegmentSchedulerActor
from edit_ray.actors.shells import CacheStoreActor, DenoiserActor
from edit_ray.actors.threads import in_own_thread
from edit_ray.config import Config
from edit_ray.engine.model_info import dtype_problem
from edit_ray.errors import ActorVersionMismatch, ConfigError, NoPlace, ResourcesUnavailable
from edit_ray.metrics.exporter import remove_targets

NAMESPACE = "edit_ray"
SCHEDULER, DENOISER, CACHE_STORE = "segment_scheduler", "denoiser", "cache_store"
PLACEMENT = "edit_ray_worker"
LIVE_RUNS, TARGETS = "live_runs", "metrics_targets"
RESTART_TIMEOUT_S = 60.0  # of the segment scheduler
END_TIMEOUT_S = 60.0  # for Ray to end what it was told to end
LOOKS = 5  # at the segment scheduler, in the time that it has for an answer
_ENDED_S = 0.3
SCHEDULER_RESOURCE = "edit_ray_scheduler"  # of nodes that are to have it; where there is none, any node may

_log = logging.getLogger(__name__)
_DIED = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)  # the latter where Ray's own killer was at it
_STAYS = {"namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}


def _use_token() -> None:
    """Has this process show Ray's token where there is one and the user has not said how to authenticate.

    Ray does so by itself only for a cluster that it starts; a client without the token is refused by such a cluster.
    """
    loader = AuthenticationTokenLoader.instance()
    if ray_token.AUTH_MODE_ENV_VAR not in os.environ and loader.has_token(ignore_auth_mode=True):
        ray_token._enable_token_auth()


def connect(address: str | None = None) -> bool:
    """Joins the Ray that is running (address None: the one that Ray itself finds, else a new local one).

    Returns whether it has started one, which ends with this process. Raises ResourcesUnavailable where nobody answers
    at the address.
    """
    if ray.is_initialized():
        return False
    starts = check_address(address) in ("", "local")
    _use_token()
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    return starts


def connect_if_running(address: str | None = None) -> bool:
    """Joins a running Ray, and starts none: False when there is none to join. Raises as `connect`.

    Without an address it is the Ray that `connect` would join: `auto` would take any other on this machine, be it
    another user's, or the private one of `make demo`.
    """
    if ray.is_initialized():
        return True
    known = check_address(address)
    if known in ("", "local"):
        return False
    try:
        _use_token()
        ray.init(address=known, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError:
        return False
    return True


def segment_scheduler(answer_timeout_s: float) -> Any:
    """The handle of the one segment scheduler, made if there is none. One that answers nothing for `answer_timeout_s`
    is killed and started again.

    Raises ActorVersionMismatch when it runs other code than this process.
    """
    needs = {SCHEDULER_RESOURCE: 0.001} if SCHEDULER_RESOURCE in ray.cluster_resources() else {}
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, resources=needs)(SegmentSchedulerActor)
    there = find_segment_scheduler() is not None
    handle = actor.options(name=SCHEDULER, **_STAYS).remote(RayPool())
    deadline = time.monotonic() + RESTART_TIMEOUT_S + (answer_timeout_s if there else 0.0)
    check_version(SCHEDULER, _described(SCHEDULER, handle, deadline, answer_timeout_s if there else math.inf))
    return handle


def find_segment_scheduler() -> Any | None:
    """The handle of the segment scheduler if one lives."""
    try:
        return ray.get_actor(SCHEDULER, namespace=NAMESPACE)
    except ValueError:
        return None


def answer_of(handle: Any, call: Any, answer_timeout_s: float) -> Any:
    """The answer to a call of the segment scheduler, however long it takes, as long as others are answered beside it.

    One that answers nothing for `answer_timeout_s` is killed and started again; then this raises RayActorError. The
    time is counted in looks, so that a caller that was stopped itself, and starts again, kills nobody.
    """
    silent, question = 0, None
    while not ray.wait([call], timeout=answer_timeout_s / LOOKS)[0]:
        if question is not None and ray.wait([question], timeout=0)[0]:
            silent, question = 0, None
        elif question is not None:
            silent += 1
        if silent == LOOKS:
            _log.warning("the segment scheduler did not answer for %g s; it is killed", answer_timeout_s)
            ray.kill(handle, no_restart=False)
            silent, question = 0, None
        question = question or handle.describe.remote()
    return ray.get(call)


def check_version(name: str, description: dict[str, Any]) -> None:
    """Raises ActorVersionMismatch where a living actor runs other code than this process."""
    if description["version"] != code_version():
        raise ActorVersionMismatch(
            f"the living actor {name!r} runs edit_ray {description['version']}, this process {code_version()}; "
            "end the old actors with `edit-ray down`, then start again"
        )


def end_actors(within: bool = False) -> list[str]:
    """Ends every actor of ours in this Ray; returns the names of those that lived.

    The segment scheduler goes first, as it starts again what dies; where it ends them itself, `within` it, last. Raises
    ResourcesUnavailable where Ray does not end them.
    """
    ended: list[str] = []
    deadline = time.monotonic() + END_TIMEOUT_S
    while names := _names_of_ours():
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
        time.sleep(_ENDED_S)  # in which what the segment scheduler had just asked for is there
    return list(dict.fromkeys(ended))


def _names_of_ours() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]


def _forget_everything() -> None:
    """Frees the actors' places; what ends the actors ends their runs, and nobody goes on with those by himself. Nor
    does Prometheus ask any more where nobody answers.
    """
    for group in _placements().values():
        remove_placement_group(group)
    internal_kv._internal_kv_del(LIVE_RUNS, namespace=NAMESPACE)
    for path, address in _recalled(TARGETS).items():
        remove_targets(Path(path), address)
    internal_kv._internal_kv_del(TARGETS, namespace=NAMESPACE)


def _recalled(key: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(internal_kv._internal_kv_get(key, namespace=NAMESPACE) or "{}")
    return known


class RayPool:
    """GPU actors, each with a CacheStore actor on its node, found or made, as the segment scheduler calls them."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._starting: dict[int, asyncio.Lock] = {}

    async def start(self, spec: RunSpec, worker: int) -> None:
        async with self._starting.setdefault(worker, asyncio.Lock()):  # two would each make the worker's place
            try:
                await in_own_thread(self._start, spec, worker)
            except _DIED as lost:
                raise ActorGone(f"an actor died while it was started: {type(lost).__name__}") from None

    async def places(self, spec: RunSpec) -> int | None:
        return await asyncio.to_thread(_places, _needs(spec.config))

    async def denoiser(self, worker: int, method: str, *arguments: Any) -> Any:
        name = name_of(DENOISER, worker)
        call = self._handle(name).call.options(
            name=f"{DenoiserActor.__name__}.{method}", concurrency_group=GROUP_OF.get(method, "control")
        )
        return await _reply(name, call.remote(method, *arguments))

    async def store(self, worker: int, method: str, *arguments: Any) -> Any:
        name = name_of(CACHE_STORE, worker)
        return await _reply(name, self._handle(name).call.remote(method, *arguments))

    async def restart_denoiser(self, worker: int) -> None:
        await self._restart(name_of(DENOISER, worker))

    async def restart_store(self, worker: int) -> None:
        await self._restart(name_of(CACHE_STORE, worker))

    async def _restart(self, name: str) -> None:
        with contextlib.suppress(ConnectionError):
            await asyncio.to_thread(ray.kill, self._handle(name), no_restart=False)

    # The Ray cluster itself keeps the pointers, because that is how long they are good for: it is what starts a segment
    # scheduler again, and when it is gone so are all actors, and `--resume` names the run.
    async def remember(self, live: Mapping[str, Pointer]) -> None:
        text = json.dumps({run_id: asdict(pointer) for run_id, pointer in live.items()})
        await asyncio.to_thread(internal_kv._internal_kv_put, LIVE_RUNS, text, namespace=NAMESPACE)

    async def recall(self) -> dict[str, Pointer]:
        known = await asyncio.to_thread(_recalled, LIVE_RUNS)
        return {run_id: Pointer(**pointer) for run_id, pointer in known.items()}

    async def remember_targets(self, targets: Mapping[str, str]) -> None:
        text = json.dumps(dict(targets))
        await asyncio.to_thread(internal_kv._internal_kv_put, TARGETS, text, namespace=NAMESPACE)

    async def recall_targets(self) -> dict[str, str]:
        return await asyncio.to_thread(_recalled, TARGETS)

    async def end(self) -> None:
        await asyncio.to_thread(end_actors, within=True)

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            raise NotStarted(f"the actor {name!r} was not started")
        return self._handles[name]

    def _start(self, spec: RunSpec, worker: int) -> None:
        deadline = time.monotonic() + spec.config.engine.start_timeout_s
        needs = _needs(spec.config)
        num_gpus = needs.get("GPU", 0)
        place = name_of(PLACEMENT, worker)
        found = _placements().get(place)
        group = found or placement_group([needs], name=place, lifetime="detached")
        store_name, denoiser_name = name_of(CACHE_STORE, worker), name_of(DENOISER, worker)
        there = _names_of_ours()

        def patience_s(name: str) -> float:
            return spec.config.engine.answer_timeout_s if name in there else math.inf

        try:
            _await_placement(group, needs, deadline)
            beside = PlacementGroupSchedulingStrategy(group)
            store = self._find_or_make(
                store_name, CacheStoreActor, {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 4}, beside, worker
            )
            denoiser = self._find_or_make(
                denoiser_name,
                DenoiserActor,
                {
                    "num_cpus": 1,
                    "num_gpus": num_gpus,
                    "max_restarts": -1,
                    "concurrency_groups": {**dict.fromkeys(GROUP_OF.values(), 1), "control": 4},
                },
                beside,
                StoreCalls(store),
            )
        except ResourcesUnavailable:
            if found is None:  # else actors that others use may live there, and this caller's time alone was too short
                remove_placement_group(group)
            raise
        check_version(store_name, _described(store_name, store, deadline, patience_s(store_name)))
        described = _described(denoiser_name, denoiser, deadline, patience_s(denoiser_name))
        check_version(denoiser_name, described)
        if num_gpus > int(described["gpus"]):
            raise ResourcesUnavailable(
                f"this run asks for {num_gpus} GPUs (model.device, engine.cfg_parallel), and the living GPU actor has "
                f"{described['gpus']}; run `edit-ray down` first"
            )
        if problem := dtype_problem(spec.config.model.torch_dtype, "cuda" if num_gpus else "cpu"):
            raise ConfigError([f"model.torch_dtype {problem}"])
        self._handles |= {store_name: store, denoiser_name: denoiser}

    def _find_or_make(self, name: str, actor: type, options: dict[str, Any], strategy: Any, *arguments: Any) -> Any:
        named = {"name": name, "scheduling_strategy": strategy, **_STAYS}
        return ray.remote(**options)(actor).options(**named).remote(*arguments)


def name_of(role: str, worker: int) -> str:
    """The name of a GPU actor, of the CacheStore actor beside it, of their place."""
    return role if worker == 0 else f"{role}-{worker}"


class StoreCalls:
    """The CacheStore actor as the GPU actor calls it: the call is under way at once, its answer can be waited for."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *arguments: Any) -> Callable[[], Any]:
        reference = self._handle.call.remote(method, *arguments)

        def reply() -> Any:
            try:
                return ray.get(reference)
            except _DIED as lost:
                raise ActorGone(f"the actor {CACHE_STORE!r} is gone: {type(lost).__name__}") from None

        return reply


async def _reply(name: str, reference: Any) -> Any:
    try:
        return await reference
    except _DIED as lost:
        raise ActorGone(f"the actor {name!r} is gone: {type(lost).__name__}") from None


def _placements() -> dict[str, PlacementGroup]:
    """Our placement groups by their names, in whichever namespace they were made."""
    return {
        group["name"]: PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
        for group_id, group in placement_group_table().items()
        if str(group["name"]).startswith(PLACEMENT) and group["state"] != "REMOVED"
    }


def _needs(config: Config) -> dict[str, int]:
    """What a GPU actor for such a run takes of a node."""
    device = config.model.device
    has_one = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    gpus = 2 if config.engine.cfg_parallel else int(has_one)
    return {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}


def _places(needs: dict[str, int]) -> int | None:
    """How many times all nodes together hold this; None where an autoscaler may start more nodes."""
    if state.get_cluster_config() is not None:
        return None
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(has.get(name, 0) // number) for name, number in needs.items()) for has in alive)


def _await_placement(group: PlacementGroup, needs: dict[str, int], deadline: float) -> None:
    """Waits for the worker's place. Raises NoPlace with what is there and what is missing."""
    if not group.wait(max(0.0, deadline - time.monotonic())):
        has, free = ray.cluster_resources(), ray.available_resources()
        lines = [f"{name}: {n} needed, {free.get(name, 0):g} free of {has.get(name, 0):g}" for name, n in needs.items()]
        raise NoPlace(
            f"the GPU actor found no place in this Ray cluster within engine.start_timeout_s ({'; '.join(lines)}); "
            "free or add resources, or choose another model.device"
        )


def _described(name: str, handle: Any, deadline: float, patience_s: float) -> Any:
    """What the actor says of itself, waiting while it is being started, or started again.

    One that has begun, and answers nothing for `patience_s`, is killed and started again.
    """
    while (left := deadline - time.monotonic()) > 0:
        try:
            return ray.get(handle.describe.remote(), timeout=min(left, patience_s))
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.2)
        except ray.exceptions.GetTimeoutError:
            begun = state.actor_table(handle._actor_id.hex()).get("State") == "ALIVE"
            if begun and patience_s < math.inf:
                _log.warning("the actor %r did not answer for %g s; it is killed", name, patience_s)
                ray.kill(handle, no_restart=False)
    raise ResourcesUnavailable(f"the actor {name!r} did not answer in time (engine.start_timeout_s)")
