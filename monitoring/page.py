"""The generated page docs/metrics.md."""

from __future__ import annotations

from edit_ray.metrics.catalog import CATALOG, LABELS, OTHER, Metric
from monitoring.alerts import ALERTS
from monitoring.rules import RECORDED

_HEAD = f"""# Metrics

Generated from `edit_ray/metrics/catalog.py` and `monitoring/` by `edit-ray dashboards`; do not edit.
[Prometheus and Grafana](../monitoring/README.md) are set up there.

The segment scheduler exports all metrics at `/metrics` from the first run on. The section `metrics` of the
configuration sets the address. Once a second it collects snapshots from the other actors; a scrape calls no actor.

- Counters only grow while a segment scheduler lives. Counters of committed segments grow with the manifest line that
  commits a segment. A restarted segment scheduler restores them from the manifests of its live runs.
- Counts of a dead actor are kept up to its last snapshot. Failed work is counted only in
  `edit_ray_work_failed_total` and `edit_ray_work_lost_seconds_total`.
- A gauge of an actor has no value before the first snapshot, and none once the last snapshot is older than 15 seconds.
- A label has the values listed below. An unknown value, from an actor of a newer version, counts as `{OTHER}`.
- `edit_ray_run_info` has one series for each live run. The other metrics have no run label: with several live runs
  they are sums, and selecting a run in a dashboard shows the times at which it was live.
"""


_DOOR = """## Requests at the HTTP door

The replicas of the [HTTP door](http.md) count their requests among Ray's own metrics, where Ray Serve's are too: every
node exports those of its replicas, whether there is a segment scheduler or not. `monitoring/` and `deploy/` scrape them
as the job `ray`.

`ray_edit_ray_http_requests_total`, a counter, has the labels `method`, `route` and `outcome`. A request is counted
once, when its answer begins.

- `route` is the template of a route, such as `/v1/videos/{video_id}`; `other` for a path that is none. `method` is
  `other` for one that no route has.
- `outcome` is `answered`, the `error.code` of the answer (a closed list), or `left`: the client has, before it was
  answered.
- Ray Serve adds `application`, `deployment` and `replica`. A request that no replica has answered is counted by Serve
  alone (`serve_num_http_error_requests`).
"""

_OPEN = {"version": "one: the version of the exporting process", "run_id": "the ids of live runs"}


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = "\n".join(_row(metric) for metric in CATALOG.values())
    labels = "\n".join(
        f"| `{label}` | {', '.join(f'`{value}`' for value in values) or _OPEN[label]} |"
        for label, values in LABELS.items()
    )
    recorded = "\n".join(f"- `{name}`" for name in RECORDED)
    alerts = "\n".join(f"| `{alert.name}` | {alert.severity} | {alert.description} |" for alert in ALERTS)
    return (
        f"{_HEAD}\n## All metrics\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n{rows}\n\n"
        f"## Labels\n\n| label | values |\n|---|---|\n{labels}\n\n"
        f"{_DOOR}\n"
        f"## Recorded by Prometheus\n\n{recorded}\n\n"
        f"## Alerts\n\n| alert | severity | meaning |\n|---|---|---|\n{alerts}\n"
    )


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    buckets = f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}." if metric.buckets else ""
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help}{buckets} |"
