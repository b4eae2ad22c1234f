"""A look at the Ray that is about to be joined: `ray.init` waits for many minutes where nobody answers."""

from __future__ import annotations

import os
import re
import socket

import grpc
from ray._private.utils import read_ray_address

from edit_ray.errors import ResourcesUnavailable

PROBE_S = 5.0
_VARIABLE = "RAY_ADDRESS"
_HEALTH = "/grpc.health.v1.Health/Check"
_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def check_address(address: str | None) -> str:
    """The address of the Ray that answers; "" or `local` where Ray would start one, `auto` where it would search.

    `address` is the caller's own.

    Raises ResourcesUnavailable within `PROBE_S` seconds, with a sentence that says where the address is from.
    """
    address, source, remedy = _address_of(address)
    if address in ("", "auto", "local"):
        return address
    if address.startswith(("http://", "https://")):
        raise ResourcesUnavailable(
            f"{source} is {address}, which is Ray's dashboard; valid is the address of Ray's head, such as "
            f"{re.split('[:/]+', address)[1]}:6379, or none where Ray runs on this machine: {remedy}"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ResourcesUnavailable(f"{source} is {address!r}; valid is a host and a port, such as 127.0.0.1:6379")
    if trouble := _trouble(host.strip("[]"), int(port), is_head="://" not in address):
        raise ResourcesUnavailable(f"no Ray answers at {address}, which is {source} ({trouble}); {remedy}")
    return address


def _address_of(address: str | None) -> tuple[str, str, str]:
    """As Ray itself finds it: the address ("" for none), where it is from, and what to do about it."""
    start = "start one with `ray start --head`"
    if address not in (None, "", "auto"):
        return str(address), "the address given", f"{start}, or give another address"
    if set_to := os.environ.get(_VARIABLE):
        return set_to, _VARIABLE, f"{start}, or `unset {_VARIABLE}`"
    stopped = "a Ray that died has left it: `ray stop` forgets it, then " + start
    return read_ray_address() or "", "the last Ray started on this machine", stopped


def _trouble(host: str, port: int, *, is_head: bool) -> str | None:
    """Why nobody can be joined there; None where somebody answers."""
    try:
        socket.create_connection((host, port), PROBE_S / 2).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    if not is_head or os.environ.get("RAY_USE_TLS", "0") not in ("0", "", "false"):
        return None
    with grpc.insecure_channel(f"{_bracketed(host)}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_HEALTH)(b"", timeout=PROBE_S / 2)
        except grpc.RpcError as error:  # whatever a head says of this call, it says something
            if error.code() in _NOBODY:
                return "the port is open, and what listens there does not answer as Ray's head does"
    return None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
