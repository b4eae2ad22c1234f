"""Every metric, once: exporter, dashboards, rules, the page of documentation and tests are made from this or checked
against it.

A label has a closed set of values, never a run, a segment, a prompt or a path; what is none of them counts as `other`.
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
Unit = Literal["", "seconds", "bytes", "info"]

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
        "none",
        "always",
        "dicache",
        "fbcache",
        "magcache",
        "ranked",
        "schedule",
        "seacache",
        "taylorseer",
        "teacache",
        "warmstart_reuse",
    ),
    "prefetch": ("useful", "late", "wasted", "unfulfilled", "cancelled"),
    "reason": ("evicted", "dead", "dropped", "replaced", "lost", "spill_failed", "full"),
    "refusal": ("too_large", "no_room", "stale_lease", "stale_event"),
    "result": ("hit", "miss"),
    "source": ("host", "disk"),
    "stage": ("prepare", "denoise", "decode", "encode", "commit", "finalize"),
    "state": ("queued", "preparing", "running", "paused", "waiting", "finalizing", "stopping"),
    "target": ("host", "disk"),
    "tier": ("host", "disk"),
    "trouble": ("error", "actor_died", "stopped"),
    "version": (),  # one value, that of the exporting process
}

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WORK_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
SCORES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Metric:
    """One family. `owner` is the actor whose snapshots it is from; a gauge has no value without them."""

    name: str
    kind: Kind
    unit: Unit
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    owner: Role | None = None

    def children(self) -> Iterator[tuple[str, ...]]:
        """The values of the labels of every child that is there from the start."""
        for values in product(*(LABELS[label] for label in self.labels)):
            of = dict(zip(self.labels, values, strict=True))
            # What is evicted goes down, what is wanted comes up.
            up = (of.get("source"), of.get("target")) == ("disk", "host")
            down = (of.get("source"), of.get("target")) == ("host", "disk")
            if "source" not in of or (down if of["cause"] == "eviction" else up):
                yield values


def _metrics() -> Iterator[Metric]:
    yield from _of_runs()
    yield from _of_caches()
    yield from _of_tiers()
    yield from _of_the_ways_between_tiers()
    yield from _of_reuse()
    yield from _of_media()
    yield from _of_actors()


def _of_runs() -> Iterator[Metric]:
    yield Metric("edit_ray_runs", "gauge", "", "Runs that live, by their state.", ("state",))
    yield Metric("edit_ray_runs_ended_total", "counter", "", "Runs that have ended, by how.", ("outcome",))
    yield Metric("edit_ray_segments_total", "counter", "", "Segments that were committed.")
    yield Metric("edit_ray_frames_total", "counter", "", "Frames of committed segments.")
    yield Metric("edit_ray_segments_remaining", "gauge", "", "Segments that live runs have planned and not committed.")
    yield Metric("edit_ray_work_in_flight", "gauge", "", "Pieces of work that are being carried out.", ("stage",))
    yield Metric(
        "edit_ray_work_failed_total",
        "counter",
        "",
        "Attempts that came to nothing: an error, the death of an actor, or a run that was stopped.",
        ("stage", "trouble"),
    )
    yield Metric(
        "edit_ray_work_lost_seconds_total",
        "counter",
        "seconds",
        "Time of attempts that came to nothing; it is in no other metric of committed work.",
        ("stage",),
    )
    yield Metric(
        "edit_ray_segment_seconds",
        "histogram",
        "seconds",
        "From the first work on a segment to its commit.",
        buckets=WORK_SECONDS,
    )
    yield Metric(
        "edit_ray_first_segment_seconds",
        "histogram",
        "seconds",
        "From a run's submission to the commit of its first segment.",
        buckets=WORK_SECONDS,
    )
    yield Metric(
        "edit_ray_work_seconds",
        "histogram",
        "seconds",
        "Each stage of the work on committed segments, and what a run's preparation and end take.",
        ("stage",),
        buckets=WORK_SECONDS,
    )


def _of_caches() -> Iterator[Metric]:
    by = ("policy", "branch", "decision")
    yield Metric(
        "edit_ray_steps_total",
        "counter",
        "",
        "Denoising steps of committed segments: skipped where every unit of the branch was reused, else computed.",
        by,
    )
    yield Metric("edit_ray_units_total", "counter", "", "Decisions about units in committed segments.", by)
    yield Metric(
        "edit_ray_step_seconds",
        "histogram",
        "seconds",
        "Denoising steps as they happen: skipped where every unit of both branches was reused, else computed.",
        ("decision",),
        buckets=STEP_SECONDS,
        owner="denoiser",
    )


def _of_tiers() -> Iterator[Metric]:
    store: Role = "cache_store"
    yield Metric("edit_ray_tier_bytes", "gauge", "bytes", "What a tier holds.", ("tier",), owner=store)
    yield Metric(
        "edit_ray_tier_budget_bytes",
        "gauge",
        "bytes",
        "What a tier may hold; none where it is not bounded.",
        ("tier",),
        owner=store,
    )
    yield Metric("edit_ray_tier_peak_bytes", "gauge", "bytes", "The most that a tier has held.", ("tier",), owner=store)
    yield Metric("edit_ray_tier_entries", "gauge", "", "Entries that a tier holds.", ("tier",), owner=store)
    yield Metric(
        "edit_ray_tier_lookups_total",
        "counter",
        "",
        "Planned reads, by the tier in which they were looked for, the fastest first, and whether it had them.",
        ("tier", "result"),
        owner=store,
    )
    yield Metric(
        "edit_ray_entries_dropped_total", "counter", "", "Entries that left all tiers.", ("reason",), owner=store
    )
    yield Metric(
        "edit_ray_refusals_total",
        "counter",
        "",
        "What the CacheStore refused: for want of room, as holder or segment are others by now, or as it was not told "
        "of the run.",
        ("refusal",),
        owner=store,
    )


def _of_the_ways_between_tiers() -> Iterator[Metric]:
    store: Role = "cache_store"
    by = ("source", "target", "cause")
    yield Metric("edit_ray_tier_moves_total", "counter", "", "Entries moved between tiers.", by, owner=store)
    yield Metric("edit_ray_tier_moved_bytes_total", "counter", "bytes", "Their bytes.", by, owner=store)
    yield Metric(
        "edit_ray_tier_move_seconds_total",
        "counter",
        "seconds",
        "Time that moves took; they overlap.",
        ("move",),
        owner=store,
    )
    yield Metric(
        "edit_ray_prefetches_requested_total",
        "counter",
        "",
        "Reads that were not in place when a segment was prepared.",
        owner=store,
    )
    yield Metric(
        "edit_ray_prefetches_total", "counter", "", "What became of those that have ended.", ("prefetch",), owner=store
    )
    yield Metric(
        "edit_ray_prefetch_wasted_bytes_total",
        "counter",
        "bytes",
        "Bytes that were brought and not read.",
        owner=store,
    )
    yield Metric(
        "edit_ray_disk_faults_total",
        "counter",
        "",
        "What went wrong with files of the disk tier; `checksum` is damage that was found.",
        ("fault",),
        owner=store,
    )


def _of_reuse() -> Iterator[Metric]:
    yield Metric(
        "edit_ray_reuse_bytes_total",
        "counter",
        "bytes",
        "Residuals that committed segments read of others, and wrote for others.",
        ("direction",),
    )
    yield Metric(
        "edit_ray_reuse_wait_seconds_total",
        "counter",
        "seconds",
        "Time that committed segments waited for residuals that came late, or for room.",
    )


def _of_media() -> Iterator[Metric]:
    yield Metric("edit_ray_media_bytes_total", "counter", "bytes", "Media of committed segments.")
    yield Metric(
        "edit_ray_seam_score",
        "histogram",
        "",
        "How visible the join of a committed segment with the one before it is; 0 is seamless.",
        buckets=SCORES,
    )
    yield Metric("edit_ray_stream_consumers", "gauge", "", "Clients that wait for a segment.")
    yield Metric(
        "edit_ray_stream_lag_segments",
        "gauge",
        "",
        "Committed segments that no client has taken, of the live run where they are most.",
    )


def _of_actors() -> Iterator[Metric]:
    by = ("actor",)
    yield Metric(
        "edit_ray_actor_up", "gauge", "", "1 where every known actor of this kind sends snapshots, else 0.", by
    )
    yield Metric(
        "edit_ray_actor_restarts_total", "counter", "", "Incarnations after the first that have sent a snapshot.", by
    )
    yield Metric(
        "edit_ray_actor_snapshot_age_seconds", "gauge", "seconds", "Since the oldest of their last snapshots.", by
    )
    yield Metric(
        "edit_ray_gpu_memory_bytes",
        "gauge",
        "bytes",
        "Memory of CUDA devices as torch counts it; none where there is no such device.",
        ("kind",),
        owner="denoiser",
    )
    yield Metric("edit_ray_scrape_seconds", "histogram", "seconds", "Answers to scrapes.", buckets=STEP_SECONDS)
    yield Metric(
        "edit_ray_metrics_cpu_seconds_total", "counter", "seconds", "CPU time of collecting and telling these metrics."
    )
    yield Metric("edit_ray_build_info", "gauge", "info", "1, with the version of edit_ray as a label.", ("version",))


CATALOG: dict[str, Metric] = {metric.name: metric for metric in _metrics()}
