"""The metrics of a segment scheduler and its actors at `/metrics` for Prometheus. A scrape calls no actor."""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import socket
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from pydantic import Field, model_validator

from edit_ray.errors import ConfigError
from edit_ray.files import read_bytes, remove, remove_drafts, write_atomic
from edit_ray.metrics.catalog import CATALOG
from edit_ray.metrics.collect import SUM, ActorMetrics, MetricValues, bounds
from edit_ray.options import Options

MIN_TOKEN = 16  # characters
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TARGETS = "edit_ray_targets.json"
_POLL_S = 0.05  # between checks for the shutdown
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class MetricsOptions(Options):
    """The exporter in the segment scheduler, at `http://address:port/metrics`; port 0 is any free port.

    Requests from other machines need the token in `token_file`.
    """

    enabled: bool = True
    address: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    port: int = Field(default=0, ge=0, le=65535)
    token_file: str | None = Field(default=None, min_length=1, max_length=4096)

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.address not in LOOPBACK and self.token_file is None:
            raise ValueError(
                f"has the address {self.address!r}, which other machines may reach, and no token_file; "
                "it must have one, or the address 127.0.0.1."
            )
        return self


class Exporter(Collector):
    """Serves one process's metrics from a registry of its own until it is closed."""

    def __init__(self, values: MetricValues, actors: ActorMetrics, options: MetricsOptions) -> None:
        """Raises ConfigError if the address cannot be bound or the token is not valid."""
        self._values, self._actors = values, actors
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._server = _listen(options, _token(options), self)
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Host and port in the form of a Prometheus target."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def page(self) -> bytes:
        """The text of a scrape."""
        return generate_latest(self.registry)

    def timed_page(self) -> bytes:
        """The page; the next one includes its time."""
        began, cpu = time.perf_counter(), time.thread_time()
        page = self.page()
        self._values.observe("edit_ray_scrape_seconds", time.perf_counter() - began)
        self._values.inc("edit_ray_metrics_cpu_seconds_total", time.thread_time() - cpu)
        return page

    def collect(self) -> Iterable[Family]:
        """Every metric of the catalog with all its children."""
        known = self._values.snapshot("")
        values = {**known.counts, **known.gauges, **self._actors.gauges()}
        seen: dict[str, dict[tuple[str, ...], None]] = {}
        for name, labels, _ in values:
            seen.setdefault(name, {})[labels] = None
        for metric in CATALOG.values():
            family = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for labels in {**dict.fromkeys(metric.children()), **seen.get(metric.name, {})}:
                if metric.kind == "histogram":
                    counts = accumulate(values.get((metric.name, labels, bound), 0) for bound in bounds(metric))
                    buckets = list(zip(bounds(metric), counts, strict=True))
                    family.add_metric(labels, buckets, values.get((metric.name, labels, SUM), 0))
                    continue
                absent = metric.kind == "gauge" and metric.owner is not None
                value = values.get((metric.name, labels, ""), None if absent else 0)
                if value is not None:
                    family.add_metric(labels, value)
            yield family

    def close(self) -> None:
        """Stops serving and frees the address."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], family: int, token: str | None, exporter: Exporter) -> None:
        self.address_family, self.exporter = family, exporter
        self.expected = None if token is None else f"Bearer {token}".encode()
        self.names = {*LOOPBACK, "[::1]", address[0], f"[{address[0]}]"}
        super().__init__(address, _ScrapeHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a client that has disconnected."""


class _ScrapeHandler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "edit-ray", ""
    timeout = 10  # seconds without a byte from the client

    def do_GET(self) -> None:
        expected, token = self.server.expected, self.headers.get("Authorization", "").encode()
        if expected is None and self._host() not in self.server.names:
            # DNS rebinding: a web page whose name resolves to this machine still sends its own name.
            self._answer(403, b"without metrics.token_file the metrics are for this machine's own names only\n")
        elif expected is not None and not hmac.compare_digest(token, expected):
            self._answer(401, b"this needs the token in metrics.token_file\n", ("WWW-Authenticate", "Bearer"))
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(404, b"the metrics are at /metrics\n")
        else:
            self._answer(200, self.server.exporter.timed_page())

    def _host(self) -> str:
        """The host name of the request, without its port."""
        return re.sub(r":[0-9]*$", "", self.headers.get("Host", "")).lower()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing."""

    def _answer(self, code: int, body: bytes, *more: tuple[str, str]) -> None:
        self.send_response(code)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *more):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _listen(options: MetricsOptions, token: str | None, exporter: Exporter) -> _Server:
    try:
        found = socket.getaddrinfo(options.address, options.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return _Server((str(address[0]), options.port), family, token, exporter)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            [
                f"metrics.address is {options.address!r} and metrics.port {options.port}, which cannot be bound "
                f"({reason}); choose an address of this machine, and another port or 0 for any free one"
            ]
        ) from None


def _token(options: MetricsOptions) -> str | None:
    if options.token_file is None:
        return None
    try:
        token = Path(options.token_file).expanduser().read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "it is not ASCII text").lower()
        raise ConfigError([f"metrics.token_file is {options.token_file!r}, which cannot be read ({reason})"]) from None
    if len(token) < MIN_TOKEN or not token.isprintable():
        raise ConfigError([f"metrics.token_file must hold one line of at least {MIN_TOKEN} printable characters"])
    return token


def remove_targets(path: Path, address: str) -> None:
    """Removes the file of `write_targets` unless it names another address by now."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(read_bytes(path))[0]["targets"] == [address]:
            remove(path)


def write_targets(root: Path, address: str) -> Path:
    """Writes the scrape target for Prometheus (its file_sd) into the folder of runs, atomically."""
    path = root / TARGETS
    remove_drafts(root, TARGETS)
    write_atomic(path, json.dumps([{"targets": [address], "labels": {}}]).encode() + b"\n")
    path.chmod(0o644)  # Prometheus may be another user
    return path
