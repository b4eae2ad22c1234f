"""The generated files by their paths in the repository."""

from __future__ import annotations

from pathlib import Path

from monitoring.boards import DASHBOARDS
from monitoring.page import metrics_page
from monitoring.rules import prometheus_rule_yaml, rule_tests_yaml, rules_yaml


def generated() -> dict[str, str]:
    """The text of each file."""
    files = {f"monitoring/grafana/dashboards/{board.name}.json": board.to_json() for board in DASHBOARDS}
    files["monitoring/prometheus/rules.yml"] = rules_yaml()
    files["monitoring/prometheus/rules_test.yml"] = rule_tests_yaml("rules.yml")
    files["deploy/kuberay/prometheus-rule.yaml"] = prometheus_rule_yaml()
    files["docs/metrics.md"] = metrics_page()
    return files


def write_generated(root: Path) -> list[Path]:
    """Writes the files that are missing or stale; returns them."""
    written = []
    for name, text in generated().items():
        path = root / name
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(path)
    return written
