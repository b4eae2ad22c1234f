"""PromQL from metrics of the catalog: a name or label that it lacks is an error here, not an empty panel there."""

from __future__ import annotations

from edit_ray.metrics.catalog import CATALOG, LABELS, PREFIX

VARIABLES = 'job=~"$job",instance=~"$instance"'
_WINDOW = "$__rate_interval"


def of(name: str, part: str = "", **labels: str) -> str:
    """A metric, its name without the prefix, for the chosen jobs and instances; `part` of a histogram."""
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
    """How much a counter grows in a second."""
    return total(f"rate({of(name, part, **labels)}[{_WINDOW}])", *by)


def ratio(some: str, whole: str) -> str:
    """Nothing where there is nothing yet: neither 0/0, nor a 0 that would be read as one."""
    return f"{some} / ({whole} > 0)"


def mean(name: str, *by: str, **labels: str) -> str:
    """The mean of what a histogram has seen of late."""
    return ratio(rate(name, *by, part="_sum", **labels), rate(name, *by, part="_count", **labels))


def quantile(q: float, name: str, *by: str, **labels: str) -> str:
    """A quantile of what a histogram has seen of late, nothing where it has seen nothing."""
    return f"histogram_quantile({q}, {rate(name, 'le', *by, part='_bucket', **labels)}) >= 0"
