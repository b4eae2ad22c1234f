"""What caches decide, and what that is worth."""

from monitoring.boards.panel import Dashboard, Panel, Row, Target
from monitoring.boards.query import mean, quantile, rate, ratio

_BY = ("policy", "branch")


def _skipped(metric: str, *by: str) -> str:
    return ratio(rate(metric, *by, decision="skipped"), rate(metric, *by))


_COMPUTED, _REUSED = mean("step_seconds", decision="computed"), mean("step_seconds", decision="skipped")
_SAVED = f"{rate('step_seconds', part='_count', decision='skipped')} * clamp_min({_COMPUTED} - {_REUSED}, 0)"

_DECISIONS = Row(
    "Decisions",
    (
        Panel(
            "Steps skipped",
            "Share of the denoising steps in which every unit of a branch was reused.",
            "percentunit",
            (Target(_skipped("steps_total", *_BY), "{{policy}}, {{branch}}"),),
        ),
        Panel(
            "Units skipped",
            "Share of the decisions about units that were to reuse; above the steps' share where units decide apart.",
            "percentunit",
            (Target(_skipped("units_total", *_BY), "{{policy}}, {{branch}}"),),
        ),
        Panel(
            "Decisions",
            "Decisions about units in committed segments, a second.",
            "short",
            (Target(rate("units_total", "branch", "decision"), "{{branch}}, {{decision}}"),),
            stacked=True,
        ),
    ),
)
_TIMES = Row(
    "What it is worth",
    (
        Panel(
            "Step time",
            "The mean of steps that were computed and of steps that were skipped.",
            "s",
            (Target(mean("step_seconds", "decision"), "{{decision}}"),),
        ),
        Panel(
            "Step time, p95",
            "The slower steps.",
            "s",
            (Target(quantile(0.95, "step_seconds", "decision"), "{{decision}}"),),
        ),
        Panel(
            "Time saved",
            "Seconds a second: steps skipped, times what a computed step takes more than a skipped one.",
            "s",
            (Target(_SAVED, "saved"),),
        ),
        Panel(
            "Denoising",
            "Share of the time that is spent in denoising steps.",
            "percentunit",
            (Target(rate("step_seconds", "decision", part="_sum"), "{{decision}}"),),
            stacked=True,
            width=12,
        ),
        Panel(
            "Steps",
            "Denoising steps a second as they happen, those of failed attempts among them.",
            "short",
            (Target(rate("step_seconds", "decision", part="_count"), "{{decision}}"),),
            stacked=True,
            width=12,
        ),
    ),
)

DASHBOARD = Dashboard("cache", "Cache policies", "What caches decide, and what that is worth.", (_DECISIONS, _TIMES))
