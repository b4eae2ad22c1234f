"""Prometheus' rules and alerts, and their test cases for promtool."""

from __future__ import annotations

from typing import Any

import yaml

from monitoring.alerts import ALERTS, Alert, Durations

_GENERATED = "# Made by `edit-ray dashboards`; do not edit.\n"
_INSTANCE = ("job", "instance")


def _share(some: str, whole: str, *by: str) -> str:
    """The fraction of a counter's growth; no series without growth."""
    labels = ", ".join((*_INSTANCE, *by))
    return f"sum by ({labels}) (rate({some}[{{window}}])) / (sum by ({labels}) (rate({whole}[{{window}}])) > 0)"


RECORDED: dict[str, str] = {
    "edit_ray:steps_skipped:ratio_rate": _share(
        'edit_ray_steps_total{{decision="skipped"}}', "edit_ray_steps_total", "policy", "branch"
    ),
    "edit_ray:tier_hits:ratio_rate": _share(
        'edit_ray_tier_lookups_total{{result="hit"}}', "edit_ray_tier_lookups_total", "tier"
    ),
    "edit_ray:tier_fill:ratio": "edit_ray_tier_bytes / (edit_ray_tier_budget_bytes > 0)",
    "edit_ray:prefetches_useful:ratio_rate": _share(
        'edit_ray_prefetches_total{{prefetch="useful"}}', "edit_ray_prefetches_total"
    ),
    "edit_ray:prefetches_late:ratio_rate": _share(
        'edit_ray_prefetches_total{{prefetch="late"}}', 'edit_ray_prefetches_total{{prefetch=~"useful|late"}}'
    ),
    "edit_ray:step_seconds:p95_rate": "histogram_quantile(0.95, sum by (job, instance, decision, le) "
    "(rate(edit_ray_step_seconds_bucket[{window}]))) >= 0",
    "edit_ray:tier_moved_bytes:rate": "sum by (job, instance, source, target) "
    "(rate(edit_ray_tier_moved_bytes_total[{window}]))",
}


def rules_yaml(durations: Durations | None = None) -> str:
    """The recording rules and the alerts, for Prometheus."""
    return _GENERATED + _dump({"groups": _groups(durations or Durations())})


def prometheus_rule_yaml() -> str:
    """The same rules for the Prometheus operator of Kubernetes."""
    about = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "edit-ray"}}
    return _GENERATED + _dump({**about, "spec": {"groups": _groups(Durations())}})


def _groups(durations: Durations) -> list[dict[str, Any]]:
    recorded = [{"record": name, "expr": _timed(expr, durations)} for name, expr in RECORDED.items()]
    interval = span(durations.scrape)
    return [
        {"name": "edit_ray_recorded", "interval": interval, "rules": recorded},
        {"name": "edit_ray_alerts", "interval": interval, "rules": [_rule(alert, durations) for alert in ALERTS]},
    ]


def rule_tests_yaml(rules_file: str) -> str:
    """Cases for `promtool test rules`: each alert fires when it should, not before, and not for healthy samples."""
    durations = Durations()
    cases = [case for alert in ALERTS for case in _cases(alert, durations)]
    interval = span(durations.scrape)
    return _GENERATED + _dump({"rule_files": [rules_file], "evaluation_interval": interval, "tests": cases})


def span(seconds: float) -> str:
    """A duration in Prometheus' notation."""
    milliseconds = round(seconds * 1000)
    for unit, size in (("m", 60_000), ("s", 1000)):
        if milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


def _timed(expr: str, durations: Durations) -> str:
    return expr.format(**{name: span(value) for name, value in vars(durations).items()})


def _lasts(alert: Alert, durations: Durations) -> float:
    return float(vars(durations)[alert.lasts]) if alert.lasts else 0.0


def _rule(alert: Alert, durations: Durations) -> dict[str, Any]:
    found = {"alert": alert.name, "expr": _timed(alert.expr, durations)}
    if alert.lasts:
        found["for"] = span(_lasts(alert, durations))
    names = {name: f"{{{{ $labels.{name} }}}}" for name in alert.labels}
    annotations = {"summary": alert.summary.format(**names), "description": alert.description}
    return {**found, "labels": {"severity": alert.severity}, "annotations": annotations}


def _cases(alert: Alert, durations: Durations) -> list[dict[str, Any]]:
    """The problem starts within the first four scrapes, so that the window passes it soon."""
    interval = span(durations.scrape)
    late = span(4 * durations.scrape + durations.window + _lasts(alert, durations) + 4 * durations.scrape)
    fires = {
        "exp_labels": {"severity": alert.severity, **alert.labels},
        "exp_annotations": {"summary": alert.summary.format(**alert.labels), "description": alert.description},
    }
    broken: list[dict[str, Any]] = [{"eval_time": late, "alertname": alert.name, "exp_alerts": [fires]}]
    if alert.lasts:
        early = span(_lasts(alert, durations) - durations.scrape)
        broken.insert(0, {"eval_time": early, "alertname": alert.name, "exp_alerts": []})
    healthy = [{"eval_time": late, "alertname": alert.name, "exp_alerts": []}]
    return [
        {
            "name": f"{alert.name}, {name}",
            "interval": interval,
            "input_series": [{"series": series, "values": values} for series, values in inputs.items()],
            "alert_rule_test": tests,
        }
        for name, inputs, tests in (("broken", alert.broken, broken), ("healthy", alert.healthy, healthy))
    ]


def _dump(content: dict[str, Any]) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True))
