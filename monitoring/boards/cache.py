"""The board of cache decisions and the time that they save."""

from monitoring.boards.panel import Dashboard, Row, growth, panel
from monitoring.boards.query import mean, quantile, rate, ratio

_BY = ("policy", "branch")


def _skipped(metric: str) -> tuple[str, str]:
    return ratio(rate(metric, *_BY, decision="skipped"), rate(metric, *_BY)), "{{policy}}, {{branch}}"


_GAIN = f"clamp_min({mean('step_seconds', decision='computed')} - {mean('step_seconds', decision='skipped')}, 0)"

_DECISIONS = Row(
    "Decisions",
    (
        panel(
            "Steps skipped",
            "Share of the denoising steps in which every unit of a branch was reused.",
            "percentunit",
            _skipped("steps_total"),
        ),
        panel(
            "Units skipped",
            "Share of the decisions to reuse a unit; above the share of steps if units decide separately.",
            "percentunit",
            _skipped("units_total"),
        ),
        growth(
            "Decisions per second",
            "Decisions about units in committed segments.",
            "short",
            "units_total",
            *("branch", "decision"),
            stacked=True,
        ),
    ),
)
_TIMES = Row(
    "Time",
    (
        panel(
            "Step time (mean)", "Computed and skipped steps.", "s", (mean("step_seconds", "decision"), "{{decision}}")
        ),
        panel(
            "Step time (p95)",
            "Computed and skipped steps.",
            "s",
            (quantile(0.95, "step_seconds", "decision"), "{{decision}}"),
        ),
        panel(
            "Time saved",
            "Per second: skipped steps, times the difference of the mean computed and the mean skipped step.",
            "s",
            (f"{rate('step_seconds', part='_count', decision='skipped')} * {_GAIN}", "saved"),
        ),
        panel(
            "Denoising",
            "Share of the time in denoising steps.",
            "percentunit",
            (rate("step_seconds", "decision", part="_sum"), "{{decision}}"),
            stacked=True,
            width=12,
        ),
        panel(
            "Steps per second",
            "Denoising steps as they happen, failed attempts included.",
            "short",
            (rate("step_seconds", "decision", part="_count"), "{{decision}}"),
            stacked=True,
            width=12,
        ),
    ),
)

DASHBOARD = Dashboard("cache", "Cache policies", "Cache decisions and the time that they save.", (_DECISIONS, _TIMES))
