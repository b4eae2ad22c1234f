"""The page of documentation about the metrics."""

from __future__ import annotations

from edit_ray.metrics.catalog import CATALOG, LABELS, OTHER, Metric
from monitoring.alerts import ALERTS
from monitoring.rules import RECORDED

_HEAD = f"""# Metrics

Made from `edit_ray/metrics/catalog.py` and `monitoring/` by `edit-ray dashboards`; do not edit.
[How to look at them](../monitoring/README.md).

The segment scheduler tells all metrics at `/metrics`, from the first run on; the section `metrics` of the configuration
says where. Once a second it asks the other actors for what they have counted; a scrape asks nobody.

- Counters only grow while a segment scheduler lives. Those of committed segments advance with the line in the manifest
  that commits a segment, and a segment scheduler that is started again takes them from the manifests of its live runs.
- What was counted by an actor that has died is kept up to its last snapshot. Work that came to nothing is counted in
  `edit_ray_work_failed_total` and `edit_ray_work_lost_seconds_total` alone.
- A gauge that an actor tells of itself has no value until the actor is heard of, and none when it has said nothing for
  15 seconds.
- A label has the values listed below. One that this version does not know, from an actor of a newer one, counts as
  `{OTHER}`.
"""


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = "\n".join(_row(metric) for metric in CATALOG.values())
    labels = "\n".join(
        f"| `{label}` | {', '.join(f'`{value}`' for value in values) or 'one: that of the exporting process'} |"
        for label, values in LABELS.items()
    )
    recorded = "\n".join(f"- `{name}`" for name in RECORDED)
    alerts = "\n".join(f"| `{alert.name}` | {alert.severity} | {alert.description} |" for alert in ALERTS)
    return (
        f"{_HEAD}\n## All metrics\n\n| metric | type | labels | what it is |\n|---|---|---|---|\n{rows}\n\n"
        f"## Labels\n\n| label | values |\n|---|---|\n{labels}\n\n"
        f"## Recorded by Prometheus\n\n{recorded}\n\n"
        f"## Alerts\n\n| alert | severity | what it means |\n|---|---|---|\n{alerts}\n"
    )


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    buckets = f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}." if metric.buckets else ""
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help}{buckets} |"
