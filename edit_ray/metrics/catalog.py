"""Every metric, declared once: exporter, dashboards, rules, docs/metrics.md and tests follow this catalog.

A label has a closed set of values and never names a segment, a prompt or a path; an unknown value counts as `other`.
`version` and `run_id` are open: one value for the exporting process, and one for each live run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

PREFIX = "edit_ray_"
OTHER = "other"
Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["segment_scheduler", "denoiser", "cache_store"]

ROLES: tuple[Role, ...] = ("segment_scheduler", "denoiser", "cache_store")
LABELS: dict[str, tuple[str, ...]] = {
    "actor": ROLES,
    "branch": ("cond", "uncond"),
    "cause": ("eviction", "prefetch", "demand"),
    "decision": ("computed", "skipped"),
    "direction": ("read", "written"),
    "fault": ("missing", "length", "header", "checksum", "read", "write", "full", "remove"),
    "kind": ("allocated", "reserved", "total"),
    "move": ("host_to_disk", "disk_to_host"),
    "outcome": ("done", "failed", "cancelled"),
    "policy": (
        *("none", "always", "dicache", "dmd", "easycache", "fbcache", "foca", "lemica", "magcache", "ranked"),
        *("schedule", "seacache", "spectrum", "taylorseer", "teacache", "warmstart_reuse"),
    ),
    "prefetch": ("useful", "late", "wasted", "unfulfilled", "cancelled"),
    "reason": ("evicted", "dead", "dropped", "replaced", "lost", "spill_failed", "full"),
    "refusal": ("too_large", "no_room", "stale_lease", "stale_event"),
    "result": ("hit", "miss"),
    "run_id": (),
    "source": ("host", "disk"),
    "stage": ("prepare", "denoise", "decode", "encode", "commit", "finalize"),
    "state": ("queued", "preparing", "running", "paused", "waiting", "finalizing", "stopping"),
    "target": ("host", "disk"),
    "tier": ("host", "disk"),
    "trouble": ("error", "actor_died", "stopped"),
    "version": (),
}

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WORK_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
SCORES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Metric:
    """One family. `owner` is the actor that counts it in its snapshots; without them such a gauge has no value."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    owner: Role | None = None

    def children(self) -> Iterator[tuple[str, ...]]:
        """The label values of every child that exists from the start."""
        for values in product(*(LABELS[label] for label in self.labels)):
            of = dict(zip(self.labels, values, strict=True))
            # Eviction moves entries down to the disk, the other causes move them up.
            down = ("host", "disk") if of.get("cause") == "eviction" else ("disk", "host")
            if "source" not in of or (of["source"], of["target"]) == down:
                yield values


def _counter(name: str, help: str, *labels: str, owner: Role | None = None) -> Metric:
    return Metric(PREFIX + name, "counter", help, labels, owner=owner)


def _gauge(name: str, help: str, *labels: str, owner: Role | None = None) -> Metric:
    return Metric(PREFIX + name, "gauge", help, labels, owner=owner)


def _histogram(
    name: str, help: str, *labels: str, buckets: tuple[float, ...] = WORK_SECONDS, owner: Role | None = None
) -> Metric:
    return Metric(PREFIX + name, "histogram", help, labels, buckets, owner)


_DECISION, _MOVE = ("policy", "branch", "decision"), ("source", "target", "cause")
_RUNS = (
    _gauge("runs", "Live runs by state.", "state"),
    _gauge("run_info", "1 for each live run, with its id and its policy as labels.", "run_id", "policy"),
    _counter("runs_ended_total", "Ended runs by outcome.", "outcome"),
    _counter("segments_total", "Committed segments."),
    _counter("frames_total", "Frames of committed segments."),
    _gauge("segments_remaining", "Planned segments of live runs that are not committed."),
    _gauge("work_in_flight", "Work items in progress by stage.", "stage"),
    _counter("work_failed_total", "Failed attempts: an error, a dead actor or a stopped run.", "stage", "trouble"),
    _counter(
        "work_lost_seconds_total", "Time of failed attempts; no other metric of committed work includes it.", "stage"
    ),
    _histogram("segment_seconds", "Time from the first work on a segment to its commit."),
    _histogram("first_segment_seconds", "Time from a run's submission to the commit of its first segment."),
    _histogram("work_seconds", "Time by stage: of committed segments, and of a run's preparation and end.", "stage"),
)
_CACHE = (
    _counter(
        "steps_total",
        "Denoising steps of committed segments: skipped if every unit of the branch was reused, else computed.",
        *_DECISION,
    ),
    _counter("units_total", "Decisions about units in committed segments.", *_DECISION),
    _histogram(
        "step_seconds",
        "Denoising steps as they happen: skipped if every unit of both branches was reused, else computed.",
        "decision",
        buckets=STEP_SECONDS,
        owner="denoiser",
    ),
    _counter("chunks_total", "Chunks of causal models in committed segments."),
    _counter("recache_seconds_total", "Time in which committed segments computed K/V of earlier chunks again."),
    _gauge("kv_bytes", "K/V on the device, with rotated keys, of a causal model's latest segment.", owner="denoiser"),
)
_TIERS = (
    _gauge("tier_bytes", "Bytes in a tier.", "tier", owner="cache_store"),
    _gauge("tier_budget_bytes", "Capacity of a tier; none if unlimited.", "tier", owner="cache_store"),
    _gauge("tier_peak_bytes", "Peak bytes in a tier.", "tier", owner="cache_store"),
    _gauge("tier_entries", "Entries in a tier.", "tier", owner="cache_store"),
    _counter(
        "tier_lookups_total",
        "Lookups of planned reads, by tier from the fastest down, and by result.",
        *("tier", "result"),
        owner="cache_store",
    ),
    _counter("entries_dropped_total", "Entries removed from all tiers.", "reason", owner="cache_store"),
    _counter(
        "refusals_total",
        "Requests that the CacheStore refused: not enough space, a stale lease, or an unknown run.",
        "refusal",
        owner="cache_store",
    ),
    _counter("tier_moves_total", "Entries moved between tiers.", *_MOVE, owner="cache_store"),
    _counter("tier_moved_bytes_total", "Bytes moved between tiers.", *_MOVE, owner="cache_store"),
    _counter("tier_move_seconds_total", "Time of moves; they overlap.", "move", owner="cache_store"),
    _counter(
        "prefetches_requested_total",
        "Reads whose entry was not in the host tier when a segment was prepared.",
        owner="cache_store",
    ),
    _counter("prefetches_total", "Ended prefetches by outcome.", "prefetch", owner="cache_store"),
    _counter("prefetch_wasted_bytes_total", "Bytes prefetched and not read.", owner="cache_store"),
    _counter(
        "disk_faults_total",
        "Errors with files of the disk tier; `checksum` is detected damage.",
        "fault",
        owner="cache_store",
    ),
    _counter("reuse_bytes_total", "Residuals that committed segments read or wrote for reuse.", "direction"),
    _counter("reuse_wait_seconds_total", "Time that committed segments waited for late residuals or for a slot."),
)
_MEDIA = (
    _counter("media_bytes_total", "Media of committed segments."),
    _histogram(
        "seam_score",
        "Visibility of the seam between a committed segment and the one before it; 0 is seamless.",
        buckets=SCORES,
    ),
    _gauge("stream_consumers", "Clients that wait for a segment."),
    _gauge("stream_lag_segments", "Committed segments that no client has taken, in the live run with the most."),
)
_ACTORS = (
    _gauge("actor_up", "1 if every known actor of this kind sends snapshots, else 0.", "actor"),
    _counter("actor_restarts_total", "Incarnations after the first that have sent a snapshot.", "actor"),
    _gauge("actor_snapshot_age_seconds", "Age of the oldest of their last snapshots.", "actor"),
    _gauge("gpu_memory_bytes", "CUDA memory as torch counts it; none without a device.", "kind", owner="denoiser"),
    _histogram("scrape_seconds", "Time of answers to scrapes.", buckets=STEP_SECONDS),
    _counter("metrics_cpu_seconds_total", "CPU time of collecting and exporting these metrics."),
    _gauge("build_info", "1, with the version of edit_ray as a label.", "version"),
)

CATALOG: dict[str, Metric] = {
    metric.name: metric for metrics in (_RUNS, _CACHE, _TIERS, _MEDIA, _ACTORS) for metric in metrics
}
