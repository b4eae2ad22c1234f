"""The board of runs and segments: progress, speed and failures."""

from monitoring.boards.panel import Dashboard, Row, gauge, growth, panel, stat
from monitoring.boards.query import VARIABLES, mean, of, quantile, rate, ratio, total

_REMAINING = total(of("segments_remaining"))
_DENOISED = [f"sum(increase({of('work_seconds', part, stage='denoise')}[$__range]))" for part in ("_sum", "_count")]
_PARALLEL = f"clamp_min({total(of('work_in_flight', stage='denoise'))}, 1)"
_LOST = rate("work_lost_seconds_total")

_NOW = Row(
    "Now",
    (
        stat("Live runs", "Runs that have not ended.", "short", total(of("runs")), "runs"),
        stat("Segments remaining", "Planned segments of live runs.", "short", _REMAINING, "segments", details="media"),
        stat(
            "ETA",
            "Remaining segments, times the mean denoising time in the range, by the segments denoised in parallel.",
            "s",
            f"{_REMAINING} * ({ratio(*_DENOISED)}) / {_PARALLEL}",
            "time",
        ),
        stat(
            "Failed attempts",
            "Failed work items in the range; runs retry before they fail.",
            "short",
            f"round(sum(increase({of('work_failed_total')}[$__range])))",
            "attempts",
            above=1,
            details="machine",
        ),
    ),
)
_RUNS = Row(
    "Runs and segments",
    (
        panel(
            "Runs",
            "The selected runs while they are live.",
            "short",
            (f'sum by (run_id, policy) (edit_ray_run_info{{{VARIABLES},run_id=~"$run"}})', "{{run_id}}, {{policy}}"),
            stacked=True,
        ),
        gauge("Runs by state", "Live runs by state.", "short", "runs", "state", stacked=True),
        growth(
            "Segments per minute",
            "Segments whose latents, media and manifest line are durable.",
            "short",
            "segments_total",
            per_s=60,
            legend="segments",
            details="tiers",
        ),
        growth(
            "Frames per second",
            "Growth of the video; at the video's own frame rate or above, it can be watched live.",
            "short",
            "frames_total",
            legend="frames",
            details="media",
        ),
        panel(
            "Segment latency (mean, p95)",
            "Time from the first work on a segment to its commit, retries included.",
            "s",
            (mean("segment_seconds"), "mean"),
            (quantile(0.95, "segment_seconds"), "p95"),
            (mean("first_segment_seconds"), "first of a run"),
        ),
        panel(
            "Time by stage",
            "Mean time of a committed segment in each stage.",
            "s",
            (mean("work_seconds", "stage"), "{{stage}}"),
            stacked=True,
            details="cache",
        ),
        gauge(
            "Work in flight",
            "Work items in progress by stage.",
            "short",
            "work_in_flight",
            "stage",
            stacked=True,
            width=24,
        ),
    ),
)
_ERRORS = Row(
    "Errors",
    (
        growth(
            "Failures per minute",
            "Failed attempts by cause.",
            "short",
            "work_failed_total",
            "trouble",
            per_s=60,
            details="machine",
        ),
        panel(
            "Lost work",
            "Share of the time spent on failed attempts.",
            "percentunit",
            (ratio(_LOST, f"({_LOST} + {rate('work_seconds', part='_sum')})"), "lost"),
            above=0.1,
        ),
        growth("Runs ended per hour", "Ended runs by outcome.", "short", "runs_ended_total", "outcome", per_s=3600),
    ),
)

DASHBOARD = Dashboard("overview", "Overview", "Runs and segments: progress, speed, failures.", (_NOW, _RUNS, _ERRORS))
