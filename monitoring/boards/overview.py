"""Runs: how many, how far, how fast, what went wrong."""

from monitoring.boards.panel import Dashboard, Panel, Row, Target
from monitoring.boards.query import mean, of, quantile, rate, ratio, total

_DENOISED = {part: of("work_seconds", part, stage="denoise") for part in ("_sum", "_count")}
_SECONDS = ratio(*(f"sum(increase({series}[$__range]))" for series in _DENOISED.values()))
_AT_A_TIME = f"clamp_min({total(of('work_in_flight', stage='denoise'))}, 1)"

_NOW = Row(
    "Now",
    (
        Panel(
            "Live runs",
            "Runs that have not ended.",
            "short",
            (Target(total(of("runs")), "runs"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Segments to go",
            "Segments that live runs have planned and not committed.",
            "short",
            (Target(total(of("segments_remaining")), "segments"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "ETA",
            "Segments to go, times what denoising one took in the range shown, over how many are denoised at a time.",
            "s",
            (Target(f"{total(of('segments_remaining'))} * ({_SECONDS}) / {_AT_A_TIME}", "time"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "Attempts lost",
            "Work that came to nothing in the range shown; runs try again before they fail.",
            "short",
            (Target(f"round(sum(increase({of('work_failed_total')}[$__range])))", "attempts"),),
            kind="stat",
            width=6,
            above=1,
        ),
    ),
)
_RUNS = Row(
    "Runs and segments",
    (
        Panel(
            "Runs by state",
            "Live runs, by where they stand.",
            "short",
            (Target(total(of("runs"), "state"), "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Segments committed",
            "Segments a minute whose latents, media and line in the manifest are durable.",
            "short",
            (Target(f"{rate('segments_total')} * 60", "segments a minute"),),
        ),
        Panel(
            "Frames committed",
            "Frames a second that the video grows by; beside the video's own rate it says whether one can watch live.",
            "short",
            (Target(rate("frames_total"), "frames a second"),),
        ),
        Panel(
            "Segment latency",
            "From the first work on a segment to its commit, retries included.",
            "s",
            (
                Target(mean("segment_seconds"), "mean"),
                Target(quantile(0.95, "segment_seconds"), "p95"),
                Target(mean("first_segment_seconds"), "first of a run"),
            ),
        ),
        Panel(
            "Time by stage",
            "What a committed segment takes in each stage.",
            "s",
            (Target(mean("work_seconds", "stage"), "{{stage}}"),),
            stacked=True,
        ),
        Panel(
            "Work in flight",
            "Pieces of work at the actors.",
            "short",
            (Target(total(of("work_in_flight"), "stage"), "{{stage}}"),),
            stacked=True,
        ),
    ),
)
_ERRORS = Row(
    "Errors",
    (
        Panel(
            "Failed attempts",
            "Attempts a minute that came to nothing, by what happened.",
            "short",
            (Target(f"{rate('work_failed_total', 'trouble')} * 60", "{{trouble}}"),),
        ),
        Panel(
            "Work lost",
            "Share of the time that went into attempts that came to nothing.",
            "percentunit",
            (
                Target(
                    ratio(
                        rate("work_lost_seconds_total"),
                        f"({rate('work_lost_seconds_total')} + {rate('work_seconds', part='_sum')})",
                    ),
                    "lost",
                ),
            ),
        ),
        Panel(
            "Runs ended",
            "Runs an hour, by how they ended.",
            "short",
            (Target(f"{rate('runs_ended_total', 'outcome')} * 3600", "{{outcome}}"),),
        ),
    ),
)

DASHBOARD = Dashboard(
    "overview", "Overview", "Runs and segments: how far, how fast, what failed.", (_NOW, _RUNS, _ERRORS)
)
