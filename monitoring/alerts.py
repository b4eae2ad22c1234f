"""What is worth waking somebody up for, with what it looks like when it is so and when it is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Samples = dict[str, str]
"""Values by series, in the notation of `promtool test rules`: one a scrape."""


@dataclass(frozen=True)
class Durations:
    """All times of rules and alerts in seconds, in one place; `scaled` ones make the alerts fire in a test's time."""

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
    """`expr` may name the durations as `{window}`. In `broken` it fires for `labels`, in `healthy` it does not."""

    name: str
    expr: str
    lasts: str  # the duration for which it must hold, "" for none
    severity: Literal["critical", "warning"]
    summary: str
    description: str
    broken: Samples
    healthy: Samples
    labels: dict[str, str] = field(default_factory=dict)


_AT = 'job="edit_ray",instance="one"'
_WHERE = {"job": "edit_ray", "instance": "one"}

ALERTS = (
    Alert(
        name="TargetDown",
        expr='up{{job="edit_ray"}} == 0',
        lasts="down",
        severity="critical",
        summary="No metrics from {instance}",
        description="Prometheus cannot scrape the segment scheduler. `edit-ray list` says whether it lives; its "
        "target goes when it ends, by itself or by `edit-ray down`.",
        broken={f"up{{{_AT}}}": "1x4 0x200"},
        healthy={f"up{{{_AT}}}": "1x4 0x2 1x200"},
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
        description="A run is at work, and neither a denoising step nor a segment has been finished. `edit-ray list` "
        "names the run; `engine.step_timeout_s` ends actors that hang.",
        broken={
            f'edit_ray_runs{{{_AT},state="running"}}': "1x200",
            f'edit_ray_step_seconds_count{{{_AT},decision="computed"}}': "0+30x4 120x200",
            f"edit_ray_segments_total{{{_AT}}}": "0+1x4 4x200",
        },
        healthy={
            f'edit_ray_runs{{{_AT},state="running"}}': "1x200",
            f'edit_ray_step_seconds_count{{{_AT},decision="computed"}}': "0+1x200",
            f"edit_ray_segments_total{{{_AT}}}": "4x200",
        },
        labels=_WHERE,
    ),
    Alert(
        name="ActorRestarting",
        expr="increase(edit_ray_actor_restarts_total[{restarts}]) > 2",
        lasts="",
        severity="warning",
        summary="The {actor} on {instance} starts again and again",
        description="It was started anew at least three times of late; its work began again each time. The actor's log "
        "in Ray's dashboard says why; it is often memory.",
        broken={f'edit_ray_actor_restarts_total{{{_AT},actor="denoiser"}}': "0x4 1x4 2x4 3x4 4x200"},
        healthy={f'edit_ray_actor_restarts_total{{{_AT},actor="denoiser"}}': "0x4 1x200"},
        labels={**_WHERE, "actor": "denoiser"},
    ),
    Alert(
        name="SegmentFailures",
        expr="sum by (job, instance, stage) "
        '(increase(edit_ray_work_failed_total{{trouble!="stopped"}}[{failures}])) > 2',
        lasts="",
        severity="warning",
        summary="The stage {stage} fails on {instance}",
        description="At least three attempts came to nothing of late. A run fails when its retries are used up "
        "(engine.segment_retries); the segment scheduler's log names the errors.",
        broken={f'edit_ray_work_failed_total{{{_AT},stage="denoise",trouble="error"}}': "0x4 2x4 4x200"},
        healthy={
            f'edit_ray_work_failed_total{{{_AT},stage="denoise",trouble="error"}}': "0x4 1x200",
            f'edit_ray_work_failed_total{{{_AT},stage="denoise",trouble="stopped"}}': "0+1x200",
        },
        labels={**_WHERE, "stage": "denoise"},
    ),
    Alert(
        name="TierNearlyFull",
        expr='edit_ray:tier_fill:ratio{{tier="disk"}} > 0.9',
        lasts="full",
        severity="warning",
        summary="The {tier} tier on {instance} is nearly full",
        description="Entries that do not fit are dropped and computed anew. `edit-ray plan` says what a run needs; "
        "give store.disk_bytes more, or reuse_window less. The host tier is full by design and never meant here.",
        broken={
            f'edit_ray_tier_bytes{{{_AT},tier="disk"}}': "95x200",
            f'edit_ray_tier_budget_bytes{{{_AT},tier="disk"}}': "100x200",
        },
        healthy={
            f'edit_ray_tier_bytes{{{_AT},tier="disk"}}': "50x200",
            f'edit_ray_tier_budget_bytes{{{_AT},tier="disk"}}': "100x200",
            f'edit_ray_tier_bytes{{{_AT},tier="host"}}': "100x200",
            f'edit_ray_tier_budget_bytes{{{_AT},tier="host"}}': "100x200",
        },
        labels={**_WHERE, "tier": "disk"},
    ),
    Alert(
        name="PrefetchLate",
        expr="edit_ray:prefetches_late:ratio_rate > 0.2",
        lasts="late",
        severity="warning",
        summary="Residuals come late on {instance}",
        description="More than a fifth of what is brought ahead of its use is waited for: the disk is too slow for "
        "what the run reads. Give store.host_bytes more, or put store.directory on a faster disk.",
        broken={
            f'edit_ray_prefetches_total{{{_AT},prefetch="useful"}}': "0+10x200",
            f'edit_ray_prefetches_total{{{_AT},prefetch="late"}}': "0+10x200",
        },
        healthy={
            f'edit_ray_prefetches_total{{{_AT},prefetch="useful"}}': "0+100x200",
            f'edit_ray_prefetches_total{{{_AT},prefetch="late"}}': "0+10x200",
        },
        labels=_WHERE,
    ),
)
