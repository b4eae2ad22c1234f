"""The catalog of metrics against the rules of Prometheus and against what the code calls things."""

import re
from typing import get_args

import pytest

from edit_ray.cache.policies import POLICIES
from edit_ray.metrics.catalog import CATALOG, LABELS, OTHER, PREFIX
from edit_ray.runs.events import EndState, RunState, Stage
from edit_ray.tiers.disk_tier import Fault
from edit_ray.tiers.planner import DropReason, Outcome, Refusal

METRICS = sorted(CATALOG.values(), key=lambda metric: metric.name)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_units_and_buckets_follow_the_rules(metric):
    assert re.fullmatch(rf"{PREFIX}[a-z][a-z0-9_]*[a-z0-9]", metric.name)
    base = metric.name.removesuffix("_total")
    assert (metric.name != base) == (metric.kind == "counter")
    assert {"seconds", "bytes", "info"}.isdisjoint(base.split("_")[:-1]), "a unit stands at the end"
    assert not base.endswith(("_ms", "_mb", "_count", "_sum", "_bucket", "_created"))
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_no_two_families_share_a_name_without_its_suffix():
    assert len({metric.name.removesuffix("_total") for metric in METRICS}) == len(METRICS)


def test_labels_are_few_closed_and_used():
    used = {label for metric in METRICS for label in metric.labels}
    assert used == set(LABELS)
    assert used.isdisjoint({"run", "segment", "prompt", "path", "worker"})
    assert {label for label, values in LABELS.items() if not values} == {"version", "run_id"}
    assert all(OTHER not in values for values in LABELS.values())
    assert sum(len(list(metric.children())) for metric in METRICS) < 500


@pytest.mark.parametrize(
    ("label", "ours"),
    [
        ("outcome", set(get_args(EndState))),
        ("stage", set(get_args(Stage))),
        ("prefetch", set(get_args(Outcome))),
        ("reason", set(get_args(DropReason))),
        ("fault", set(get_args(Fault))),
        ("refusal", set(get_args(Refusal)) | {"stale_lease", "stale_event"}),
        ("policy", {"none"} | {name for name in POLICIES.names() if POLICIES.find(name).__module__.startswith("edit")}),
        ("state", set(get_args(RunState)) - set(get_args(EndState)) - {"open"}),
    ],
)
def test_label_values_are_those_of_the_code(label, ours):
    assert ours <= set(LABELS[label])
