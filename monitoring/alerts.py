"""Alerts, each with samples for which it fires and samples for which it does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Samples = dict[str, str]
"""Values by series, one per scrape, in the notation of `promtool test rules`."""


@dataclass(frozen=True)
class Durations:
    """All times of rules and alerts, in seconds; tests use `scaled` ones."""

    scrape: float = 5
    window: float = 300  # of rates
    down: float = 120
    stalled: float = 300
    full: float = 600
    late: float = 600
    restarts: float = 900
    failures: float = 900

    def scaled(self, factor: float) -> Durations:
        return Durations(**{name: value * factor for name, value in vars(self).items()})


@dataclass(frozen=True)
class Alert:
    """`expr` may use durations as `{window}`. It fires for `labels` with `broken`, and not with `healthy`."""

    name: str
    expr: str
    lasts: str  # the name of the duration for which it must hold, or ""
    severity: Literal["critical", "warning"]
    summary: str
    description: str
    broken: Samples
    healthy: Samples
    labels: dict[str, str] = field(default_factory=dict)


_WHERE = {"job": "edit_ray", "instance": "one"}


def _series(name: str, values: str, **labels: str) -> Samples:
    """The values of one series of the test's instance."""
    chosen = ",".join(f'{label}="{value}"' for label, value in (_WHERE | labels).items())
    return {f"{name}{{{chosen}}}": values}


def _disk(filled: int) -> Samples:
    """A disk tier filled to a percentage."""
    return _series("edit_ray_tier_bytes", f"{filled}x200", tier="disk") | _series(
        "edit_ray_tier_budget_bytes", "100x200", tier="disk"
    )


def _prefetches(useful: int, late: int) -> Samples:
    """Prefetches per scrape by outcome."""
    return _series("edit_ray_prefetches_total", f"0+{useful}x200", prefetch="useful") | _series(
        "edit_ray_prefetches_total", f"0+{late}x200", prefetch="late"
    )


def _running(steps: str, segments: str) -> Samples:
    """A running run with the counts of its steps and segments."""
    return (
        _series("edit_ray_runs", "1x200", state="running")
        | _series("edit_ray_step_seconds_count", steps, decision="computed")
        | _series("edit_ray_segments_total", segments)
    )


_RESTARTS, _FAILED = "edit_ray_actor_restarts_total", "edit_ray_work_failed_total"

ALERTS = (
    Alert(
        name="TargetDown",
        expr='up{{job="edit_ray"}} == 0',
        lasts="down",
        severity="critical",
        summary="No metrics from {instance}",
        description="Prometheus cannot scrape the segment scheduler. `edit-ray list` shows whether it is alive; its "
        "target is removed when it ends by itself or by `edit-ray down`.",
        broken=_series("up", "1x4 0x200"),
        healthy=_series("up", "1x4 0x2 1x200"),
        labels=_WHERE,
    ),
    Alert(
        name="GenerationStalled",
        expr='sum by (job, instance) (edit_ray_runs{{state="running"}}) > 0 and sum by (job, instance) '
        "(increase(edit_ray_step_seconds_count[{window}])) == 0 and sum by (job, instance) "
        "(increase(edit_ray_segments_total[{window}])) == 0",
        lasts="stalled",
        severity="critical",
        summary="A run makes no progress on {instance}",
        description="A run is active, but no denoising step and no segment has finished. `edit-ray list` shows the "
        "run; `engine.step_timeout_s` ends actors that hang.",
        broken=_running("0+30x4 120x200", "0+1x4 4x200"),
        healthy=_running("0+1x200", "4x200"),
        labels=_WHERE,
    ),
    Alert(
        name="ActorRestarting",
        expr="increase(edit_ray_actor_restarts_total[{restarts}]) > 2",
        lasts="",
        severity="warning",
        summary="The {actor} on {instance} restarts repeatedly",
        description="It was restarted at least three times recently, and its work started again each time. The actor's "
        "log in Ray's dashboard shows why; often it runs out of memory.",
        broken=_series(_RESTARTS, "0x4 1x4 2x4 3x4 4x200", actor="denoiser"),
        healthy=_series(_RESTARTS, "0x4 1x200", actor="denoiser"),
        labels={**_WHERE, "actor": "denoiser"},
    ),
    Alert(
        name="SegmentFailures",
        expr="sum by (job, instance, stage) "
        '(increase(edit_ray_work_failed_total{{trouble!="stopped"}}[{failures}])) > 2',
        lasts="",
        severity="warning",
        summary="The stage {stage} fails on {instance}",
        description="At least three attempts failed recently. A run fails when its retries are used up "
        "(engine.segment_retries); the segment scheduler's log has the errors.",
        broken=_series(_FAILED, "0x4 2x4 4x200", stage="denoise", trouble="error"),
        healthy=_series(_FAILED, "0x4 1x200", stage="denoise", trouble="error")
        | _series(_FAILED, "0+1x200", stage="denoise", trouble="stopped"),
        labels={**_WHERE, "stage": "denoise"},
    ),
    Alert(
        name="TierNearlyFull",
        expr='edit_ray:tier_fill:ratio{{tier="disk"}} > 0.9',
        lasts="full",
        severity="warning",
        summary="The {tier} tier on {instance} is nearly full",
        description="Entries that do not fit are dropped and recomputed. `edit-ray plan` estimates what a run needs; "
        "raise store.disk_bytes, or lower cache.reuse_window. The host tier is full by design and never alerts.",
        broken=_disk(95),
        healthy=_disk(50)
        | _series("edit_ray_tier_bytes", "100x200", tier="host")
        | _series("edit_ray_tier_budget_bytes", "100x200", tier="host"),
        labels={**_WHERE, "tier": "disk"},
    ),
    Alert(
        name="PrefetchLate",
        expr="edit_ray:prefetches_late:ratio_rate > 0.2",
        lasts="late",
        severity="warning",
        summary="Prefetches are late on {instance}",
        description="More than a fifth of the prefetches end after their read: the disk is too slow for the run. "
        "Raise store.host_bytes, or put store.directory on a faster disk.",
        broken=_prefetches(10, 10),
        healthy=_prefetches(100, 10),
        labels=_WHERE,
    ),
)
