"""Prometheus as the tests use it: its programs, what a page says, a server that scrapes."""

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from edit_ray.metrics.collect import series
from edit_ray.metrics.exporter import TARGETS
from jobs.demo import free_port
from monitoring.rules import rules_yaml, span
from tests.unit.chromium import require

MONITORING = Path(__file__).resolve().parents[1] / "monitoring" / "prometheus"


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


def value_of(values, name, part="", **labels):
    """A series among a process's own values, 0 if it has none."""
    known, of = values.snapshot(""), series(name, part, **labels)
    return known.gauges.get(of, known.counts.get(of, 0))


def page_of(root):
    """What the exporter serves that is named in a folder of runs; after a recovery it is named a little later."""
    deadline = time.monotonic() + 10
    while not (root / TARGETS).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (target,) = json.loads((root / TARGETS).read_text())[0]["targets"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        return answer.read()


class Prometheus:
    """A Prometheus that runs on the repository's own configuration, only faster."""

    def __init__(self, folder, runs, ray_targets, durations):
        """`runs` is the folder of runs, `ray_targets` the file in which Ray names its own."""
        folder.mkdir()
        (folder / "runs").symlink_to(runs)
        (folder / "rules.yml").write_text(rules_yaml(durations))
        settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        settings["global"] = dict.fromkeys(settings["global"], span(durations.scrape))
        ours, rays = (config["file_sd_configs"][0] for config in settings["scrape_configs"])
        ours["refresh_interval"], rays["files"] = "1s", [str(ray_targets)]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        program, port = need("prometheus"), free_port()
        self.url = f"http://127.0.0.1:{port}/api/v1/"
        self._log = (folder / "log").open("w")
        command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        command.append(f"--web.listen-address=127.0.0.1:{port}")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def ask(self, path, **parameters):
        url = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as refused:
            with refused:
                raise AssertionError(f"{parameters}: {refused.read().decode()}") from None

    def series(self, expr, start, end):
        """The labels and the finite values of each series in a span of time."""
        found = self.ask("query_range", query=expr, start=start, end=end, step=1)["result"]
        values = [(one["metric"], [float(value) for _, value in one["values"]]) for one in found]
        return [(labels, [value for value in of if math.isfinite(value)]) for labels, of in values]

    def alerts(self, *states):
        """The names of the alerts that are `firing`, or `pending`, now."""
        alerts = self.ask("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] in states}

    def up(self, job):
        """How many targets of a job are scraped."""
        targets = self.ask("targets")["activeTargets"]
        return sum(target["labels"]["job"] == job and target["health"] == "up" for target in targets)

    def __enter__(self):
        deadline = time.monotonic() + 60
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"Prometheus is not ready: {Path(self._log.name).read_text()}")
            time.sleep(0.05)
        return self

    def _is_ready(self):
        try:
            with urllib.request.urlopen(self.url.replace("api/v1/", "-/ready"), timeout=10):
                return True
        except OSError:
            return False

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._log.close()
