"""The board of actors, GPU memory, Ray's node metrics and the requests at the HTTP door."""

from edit_ray.metrics.collect import STALE_S
from monitoring.boards.panel import Dashboard, Row, gauge, growth, panel
from monitoring.boards.query import VARIABLES, of, quantile

_ACTORS = Row(
    "Actors",
    (
        panel(
            "Actors up",
            "1 if every known actor of a kind sends snapshots.",
            "short",
            (f"min by (actor) ({of('actor_up')})", "{{actor}}"),
            below=1,
        ),
        growth("Restarts per hour", "Restarted actors.", "short", "actor_restarts_total", "actor", per_s=3600, above=1),
        panel(
            "Last heard from",
            f"Age of an actor's last snapshot; its gauges are exported for {STALE_S:g} seconds.",
            "s",
            (f"max by (actor) ({of('actor_snapshot_age_seconds')})", "{{actor}}"),
            above=STALE_S,
        ),
        panel("Scrape time (p99)", "Time of an answer.", "s", (quantile(0.99, "scrape_seconds"), "p99")),
        growth("Cost of these metrics", "CPU time.", "percentunit", "metrics_cpu_seconds_total", legend="CPU"),
        panel(
            "Versions",
            "Versions of edit_ray by instance.",
            "short",
            (f"sum by (version, instance) (edit_ray_build_info{{{VARIABLES}}})", "{{version}}, {{instance}}"),
        ),
    ),
)


def _of_ray(title: str, description: str, unit: str, metric: str) -> tuple[str, str, str, tuple[str, str]]:
    return title, description, unit, (f"avg by (instance) (ray_{metric})", "{{instance}}")


_GPU = Row(
    "GPU",
    (
        gauge(
            "GPU memory",
            "Allocated to tensors, reserved by torch, and total.",
            "bytes",
            *("gpu_memory_bytes", "kind"),
            needs_gpu=True,
            width=12,
        ),
        panel(
            "GPU utilization",
            "Utilization of each device, as Ray reports it.",
            "percent",
            ("avg by (GpuIndex, instance) (ray_node_gpus_utilization)", "GPU {{GpuIndex}} of {{instance}}"),
            needs_gpu=True,
            width=12,
        ),
    ),
)
_RAY = Row(
    "Ray",
    (
        panel(*_of_ray("Node CPU", "Utilization of all cores.", "percent", "node_cpu_utilization"), above=95),
        panel(*_of_ray("Node memory", "Used memory, shared memory and the arena included.", "bytes", "node_mem_used")),
        panel(*_of_ray("Node shared memory", "The arena and Ray's object store.", "bytes", "node_mem_shared_bytes")),
    ),
)
_REQUESTS = "sum by ({by}) (rate(ray_edit_ray_http_requests_total{refused}[$__rate_interval])) * 60"
_DOOR = Row(
    "HTTP door",
    (
        panel(
            "Requests per minute",
            "Requests that the door's replicas have answered, by route.",
            "short",
            (_REQUESTS.format(by="method, route", refused=""), "{{method}} {{route}}"),
            needs_door=True,
            width=12,
        ),
        panel(
            "Refusals per minute",
            "Requests that were not carried out, by the code of the error, and clients that left before an answer.",
            "short",
            (_REQUESTS.format(by="route, outcome", refused='{outcome!="answered"}'), "{{outcome}}: {{route}}"),
            needs_door=True,
            width=12,
        ),
    ),
)

DASHBOARD = Dashboard(
    "machine", "Ray and GPU", "Actors, GPU memory, Ray's nodes and the HTTP door.", (_ACTORS, _GPU, _RAY, _DOOR)
)
