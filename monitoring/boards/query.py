"""PromQL from metrics of the catalog: an unknown name or label is an error here, not an empty panel in Grafana."""

from __future__ import annotations

from edit_ray.metrics.catalog import CATALOG, LABELS, PREFIX

VARIABLES = 'job=~"$job",instance=~"$instance"'
# `version` matches $run only if all runs are selected: then a panel also shows times without a live run.
_SELECTED = f'edit_ray_run_info{{{VARIABLES},run_id=~"$run"}} or edit_ray_build_info{{{VARIABLES},version=~"$run"}}'
_WINDOW = "$__rate_interval"


def while_selected(expr: str) -> str:
    """The expression at the times when a selected run is live."""
    return f"({expr}) and on () ({_SELECTED})"


def of(name: str, part: str = "", **labels: str) -> str:
    """A metric, its name without the prefix, for the selected jobs and instances; `part` of a histogram."""
    metric = CATALOG[PREFIX + name]
    for label, value in labels.items():
        if label not in metric.labels or value not in LABELS[label]:
            raise ValueError(f"{metric.name} has no {label}={value!r}")
    chosen = "".join(f',{label}="{value}"' for label, value in labels.items())
    return f"{metric.name}{part}{{{VARIABLES}{chosen}}}"


def total(selected: str, *by: str) -> str:
    """The sum over instances, by labels."""
    return f"sum by ({', '.join(by)}) ({selected})" if by else f"sum({selected})"


def rate(name: str, *by: str, part: str = "", **labels: str) -> str:
    """The growth of a counter per second."""
    return total(f"rate({of(name, part, **labels)}[{_WINDOW}])", *by)


def ratio(some: str, whole: str) -> str:
    """A quotient without a value if the whole is 0."""
    return f"{some} / ({whole} > 0)"


def mean(name: str, *by: str, **labels: str) -> str:
    """The mean of a histogram's recent values."""
    return ratio(rate(name, *by, part="_sum", **labels), rate(name, *by, part="_count", **labels))


def quantile(q: float, name: str, *by: str, **labels: str) -> str:
    """A quantile of a histogram's recent values, without a value if there are none."""
    return f"histogram_quantile({q}, {rate(name, 'le', *by, part='_bucket', **labels)}) >= 0"
