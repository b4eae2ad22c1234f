"""Prometheus as the tests use it: its programs, what a page says, a server that scrapes."""

import shutil

from prometheus_client.parser import text_string_to_metric_families

from tests.unit.chromium import require


def need(program):
    """The path of a program; without it the test is skipped, or fails where EDIT_RAY_REQUIRE names `prometheus`."""
    path = shutil.which(program)
    require("prometheus", path is not None, f"{program} is not installed (apt-get install prometheus)")
    return path


def samples_of(page):
    """A function of a sample's name and labels, which gives its value or None."""
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }
    return lambda name, **labels: found.get((name, *sorted(labels.items())))
