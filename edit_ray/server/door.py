"""The door on Ray Serve: stateless replicas of the application, on the cluster that there is, else on a private one."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import ControllerOptions, HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.metrics import Counter

from edit_ray.actors import connection
from edit_ray.client import LongVideoClient
from edit_ray.config import Config
from edit_ray.errors import ConfigError, EditRayError, ResourcesUnavailable
from edit_ray.runs.folder import folders_in
from edit_ray.runs.ids import Owner
from edit_ray.server.app import make_app
from edit_ray.server.gate import Entrance, Limits
from edit_ray.server.models import offers_of
from edit_ray.server.proxy_answers import CALLBACK
from edit_ray.server.request_counts import LABELS, Count

APPLICATION, DEPLOYMENT = "edit_ray", "Door"
COUNTER = "edit_ray_http_requests_total"  # before which Ray puts ray_
JOB = "edit-ray-serve"  # in the place of a Ray job's id, it names the runs that a door has accepted
CPUS = 0  # that a replica reserves: it mostly waits, and where GPU actors take all, one that died would have no place
ONGOING = 2000  # requests at once in a replica, most of which are readers of events
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DoorSettings:
    """What every replica is made from. `models` are configurations by the names under which they are offered.

    `continues`: each replica continues the runs of a lost cluster when it starts, where nobody called `start`.
    """

    output: Path
    owner: Owner
    models: tuple[tuple[str, Config], ...]
    entrance: Entrance = field(default_factory=Entrance)
    limits: Limits = field(default_factory=Limits)
    replicas: int = 1
    continues: bool = False


class Door:
    """A replica: it holds nothing that is not in the runs' folders."""

    def __init__(self, settings: DoorSettings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Any:
        client = LongVideoClient(output=self._settings.output)
        client.owner = self._settings.owner
        of = self._settings
        if of.continues:  # another replica may be at it too: a run has one lock
            threading.Thread(target=continue_runs, args=(client,), name="continue", daemon=True).start()
        return make_app(client, offers_of(of.models), of.entrance, of.limits, _counter())


def _counter() -> Count:
    """Counts a replica's requests where Ray's own metrics are, which has those of every replica, whoever lives."""
    said = "Requests at the HTTP door, by route and by what came of them."
    counter = Counter(COUNTER, said, LABELS)  # type: ignore[arg-type]  # Ray's annotation says one label

    def count(labels: dict[str, str]) -> None:
        counter.inc(tags=labels)

    return count


@dataclass(frozen=True)
class Started:
    """Where the door answers, and which runs of a lost cluster are continued."""

    url: str
    continued: tuple[str, ...]


def application(settings: DoorSettings) -> Any:
    """The application of Ray Serve, which is not begun yet."""
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=settings.replicas,
        max_ongoing_requests=ONGOING,
        ray_actor_options={"num_cpus": CPUS},
        graceful_shutdown_timeout_s=2,
    )(serve.ingress()(Door))
    return deployment.bind(settings)


def start(settings: DoorSettings, address: str | None = None) -> Started:
    """Start the replicas, and Ray if there is none. Runs that the door has accepted and nobody works on are continued.

    Raises ConfigError if the port cannot be had, ResourcesUnavailable.
    """
    connection.connect(address)
    _check_proxy(settings.entrance)
    where = settings.entrance
    # The proxy of each node would listen on an address that only one node has.
    serve.start(
        ProxyLocation.HeadOnly,
        HTTPOptions(host=where.host, port=where.port),
        # Serve's proxies have it from their controller.
        controller_options=ControllerOptions(
            runtime_env={"env_vars": {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK}}
        ),
    )
    try:
        serve.run(application(settings), name=APPLICATION, route_prefix="/")
    except RuntimeError as failed:
        raise ResourcesUnavailable(f"Ray Serve has not started the door: {str(failed).splitlines()[0]}") from None
    client = LongVideoClient(output=settings.output)
    client.owner = settings.owner
    host = f"[{where.host}]" if ":" in where.host else where.host
    return Started(f"http://{host}:{where.port}/", tuple(continue_runs(client)))


def stop() -> None:
    """End the replicas, and Ray Serve unless it serves others; runs go on."""
    serve.delete(APPLICATION)
    if not serve.status().applications:
        serve.shutdown()


def continue_runs(client: LongVideoClient) -> list[str]:
    """Resume the runs that a door of this owner has accepted, and that nobody works on: those of a lost cluster."""
    continued = []
    for folder in folders_in(client.output):
        try:
            status = client.status(folder.run_id)
            if status.state == "open" and (status.owner, status.job) == (client.owner.name, JOB):
                client.resume(folder.run_id)
                continued.append(folder.run_id)
        except EditRayError as error:
            _log.warning("run %s is not continued: %s", folder.run_id, error)
    return continued


def _check_proxy(entrance: Entrance) -> None:
    """Raise ConfigError where Serve listens elsewhere already: its address cannot be changed."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        return
    known = running.http_config
    if (known.host, known.port) != (entrance.host, entrance.port):
        raise ConfigError(
            [
                f"--host and --port are {entrance.host}:{entrance.port}, and Ray Serve of this cluster listens on "
                f"{known.host}:{known.port}; give those, or end it with `serve shutdown`."
            ]
        )
