"""The actors, the memory of GPUs, and what Ray itself tells of the machines."""

from edit_ray.metrics.collect import STALE_S
from monitoring.boards.panel import Dashboard, Panel, Row, Target
from monitoring.boards.query import VARIABLES, of, quantile, rate, total

_ACTORS = Row(
    "Actors",
    (
        Panel(
            "Actors up",
            "1 where every known actor of a kind sends snapshots.",
            "short",
            (Target(f"min by (actor) ({of('actor_up')})", "{{actor}}"),),
        ),
        Panel(
            "Restarts",
            "Actors that were started anew, an hour.",
            "short",
            (Target(f"{rate('actor_restarts_total', 'actor')} * 3600", "{{actor}}"),),
        ),
        Panel(
            "Last heard from",
            "Since an actor was heard of; what it said of itself is told for 15 seconds.",
            "s",
            (Target(f"max by (actor) ({of('actor_snapshot_age_seconds')})", "{{actor}}"),),
            above=STALE_S,
        ),
        Panel(
            "Scrapes",
            "What the answer to a scrape takes.",
            "s",
            (Target(quantile(0.99, "scrape_seconds"), "p99"),),
        ),
        Panel(
            "Cost of these metrics",
            "CPU seconds a second.",
            "percentunit",
            (Target(rate("metrics_cpu_seconds_total"), "CPU"),),
        ),
        Panel(
            "Versions",
            "Of edit_ray, by instance.",
            "short",
            (Target(f"sum by (version, instance) (edit_ray_build_info{{{VARIABLES}}})", "{{version}}, {{instance}}"),),
        ),
    ),
)
_GPU = Row(
    "GPU",
    (
        Panel(
            "GPU memory",
            "As torch counts it: in tensors, reserved, and what the device has.",
            "bytes",
            (Target(total(of("gpu_memory_bytes"), "kind"), "{{kind}}"),),
            needs_gpu=True,
            width=12,
        ),
        Panel(
            "GPU utilization",
            "Of each device, as Ray reports it.",
            "percent",
            (Target("avg by (GpuIndex, instance) (ray_node_gpus_utilization)", "GPU {{GpuIndex}} of {{instance}}"),),
            needs_gpu=True,
            width=12,
        ),
    ),
)
_RAY = Row(
    "Ray",
    (
        Panel(
            "CPU of nodes",
            "Of all cores, as Ray reports it.",
            "percent",
            (Target("avg by (instance) (ray_node_cpu_utilization)", "{{instance}}"),),
        ),
        Panel(
            "Memory of nodes",
            "Used; shared memory, and with it the arena, is part of it.",
            "bytes",
            (Target("avg by (instance) (ray_node_mem_used)", "{{instance}}"),),
        ),
        Panel(
            "Shared memory of nodes",
            "Used: the arena and Ray's object store.",
            "bytes",
            (Target("avg by (instance) (ray_node_mem_shared_bytes)", "{{instance}}"),),
        ),
    ),
)

DASHBOARD = Dashboard("machine", "Ray and GPU", "Actors, GPUs, and what Ray tells of its nodes.", (_ACTORS, _GPU, _RAY))
