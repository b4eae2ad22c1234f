"""Joining a Ray cluster. Its address is checked first, as `ray.init` waits many minutes where nothing answers."""

from __future__ import annotations

import logging
import os
import re
import socket

import grpc
import ray
from ray._private.authentication import authentication_token_setup as ray_token
from ray._private.utils import read_ray_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from edit_ray.errors import ResourcesUnavailable

NAMESPACE = "edit_ray"
PROBE_S = 5.0
_VARIABLE = "RAY_ADDRESS"
_HEALTH = "/grpc.health.v1.Health/Check"
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def connect(address: str | None = None) -> bool:
    """Join the running Ray (address None: the one that Ray itself finds, else a new local one).

    Returns whether it started one, which ends with this process. Raises ResourcesUnavailable if nothing answers.
    """
    if ray.is_initialized():
        return False
    starts = check_address(address) in ("", "local")
    _init(address)
    return starts


def connect_if_running(address: str | None = None) -> bool:
    """Join a running Ray and never start one: False if there is none. Raises as `connect`.

    Without an address it is the Ray that `connect` would join. `auto` would take any other Ray on this machine, such as
    another user's, or the private one of `make demo`.
    """
    if ray.is_initialized():
        return True
    known = check_address(address)
    if known in ("", "local"):
        return False
    try:
        _init(known)
    except ConnectionError:
        return False
    return True


def _init(address: str | None) -> None:
    """`ray.init`, with Ray's token if there is one and the user has not said how to authenticate.

    Ray itself does so only for a cluster that it starts; such a cluster refuses a client without the token.
    """
    loader = AuthenticationTokenLoader.instance()
    if ray_token.AUTH_MODE_ENV_VAR not in os.environ and loader.has_token(ignore_auth_mode=True):
        ray_token._enable_token_auth()
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)


def check_address(address: str | None) -> str:
    """The address of the Ray that answers; "" or `local` if Ray would start one, `auto` if it would search.

    Raises ResourcesUnavailable within `PROBE_S` seconds, with a sentence that says where the address comes from.
    """
    address, source, remedy = _address_of(address)
    if address in ("", "auto", "local"):
        return address
    if address.startswith(("http://", "https://")):
        raise ResourcesUnavailable(
            f"{source} is {address}, which is Ray's dashboard; it must be the address of Ray's head, such as "
            f"{re.split('[:/]+', address)[1]}:6379, or none where Ray runs on this machine: {remedy}"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ResourcesUnavailable(f"{source} is {address!r}; it must be a host and a port, such as 127.0.0.1:6379")
    if trouble := _trouble(host.strip("[]"), int(port), is_head="://" not in address):
        raise ResourcesUnavailable(f"no Ray answers at {address}, which is {source} ({trouble}); {remedy}")
    return address


def _address_of(address: str | None) -> tuple[str, str, str]:
    """The address as Ray itself finds it ("" for none), its source, and what to do if nothing answers there."""
    start = "start one with `ray start --head`"
    if address not in (None, "", "auto"):
        return str(address), "the address given", f"{start}, or give another address"
    if set_to := os.environ.get(_VARIABLE):
        return set_to, _VARIABLE, f"{start}, or `unset {_VARIABLE}`"
    stopped = "a Ray that died has left it: `ray stop` forgets it, then " + start
    return read_ray_address() or "", "the last Ray started on this machine", stopped


def _trouble(host: str, port: int, *, is_head: bool) -> str | None:
    """Why there is no Ray to join; None if one answers."""
    try:
        socket.create_connection((host, port), PROBE_S / 2).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    if not is_head or os.environ.get("RAY_USE_TLS", "0") not in ("0", "", "false"):
        return None
    bracketed = f"[{host}]" if ":" in host else host
    with grpc.insecure_channel(f"{bracketed}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_HEALTH)(b"", timeout=PROBE_S / 2)
        except grpc.RpcError as error:  # any other code is an answer
            if error.code() in _NOBODY:
                return "the port is open, and what listens there does not answer as Ray's head does"
    return None
