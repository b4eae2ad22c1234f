"""The board of cache decisions and the time that they save."""

from monitoring.boards.panel import Dashboard, Row, gauge, growth, panel
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

_CHUNKS = Row(
    "Causal models",
    (
        growth("Chunks per second", "Chunks in committed segments.", "short", "chunks_total", legend="chunks"),
        panel(
            "K/V computed again",
            "Share of the denoising time in which segments computed K/V of earlier chunks again.",
            "percentunit",
            (ratio(rate("recache_seconds_total"), rate("work_seconds", part="_sum", stage="denoise")), "share"),
        ),
        gauge("K/V", "On the device, with rotated keys, of the latest segments.", "bytes", "kv_bytes", legend="K/V"),
    ),
)

DASHBOARD = Dashboard(
    "cache",
    "Cache policies",
    "Cache decisions, the time that they save, and K/V.",
    (_DECISIONS, _TIMES, _CHUNKS),
)
