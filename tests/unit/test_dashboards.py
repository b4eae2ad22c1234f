"""Dashboards, rules and the page of metrics: fresh, and as Grafana and Prometheus want them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edit_ray.cli.main import main
from edit_ray.metrics.catalog import CATALOG, LABELS
from monitoring.alerts import ALERTS, Durations
from monitoring.boards import DASHBOARDS
from monitoring.boards.query import of, while_selected
from monitoring.generate import generated
from monitoring.rules import RECORDED, rules_yaml, span
from tests.prometheus import need

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "monitoring"
TARGETS = [(t.expr, t.legend) for board in DASHBOARDS for panel in board.panels for t in panel.targets]
UNITS = {"short", "s", "bytes", "Bps", "percent", "percentunit"}


def test_what_is_committed_is_what_is_made():
    stale = [name for name, text in generated().items() if (ROOT / name).read_text() != text]
    assert stale == [], "run `edit-ray dashboards` in the clone"
    there = {path.relative_to(ROOT).as_posix() for path in (MONITORING / "grafana" / "dashboards").iterdir()}
    assert there == {name for name in generated() if "/dashboards/" in name}


def test_the_command_writes_what_differs(tmp_path, capsys):
    assert main(["dashboards", "--into", str(tmp_path)]) == 0
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == set(generated())
    (tmp_path / "docs" / "metrics.md").write_text("old")
    capsys.readouterr()
    assert main(["dashboards", "--into", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "docs" / "metrics.md"), "1 files written"]
    (tmp_path / "file").write_text("")
    assert main(["dashboards", "--into", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)
def test_a_dashboard_asks_for_its_datasource_job_and_instance(board):
    made = json.loads(board.to_json())
    assert "__inputs" not in board.to_json()
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert variables.pop("datasource")["type"] == "datasource"
    assert variables.keys() == {"job", "run", "instance"}
    assert all(of["type"] == "query" and of["includeAll"] and of["multi"] for of in variables.values())
    assert all('run_id=~"$run"' in target.expr for panel in board.panels for target in panel.targets)
    for panel in made["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        for found in panel.get("links", ()):
            assert re.match(r"/d/([\w-]+)\?", found["url"])[1] in {f"edit-ray-{other.name}" for other in DASHBOARDS}
    (link,) = made["links"]
    assert set(link["tags"]) <= set(made["tags"]), "it leads to the other dashboards"
    assert (link["includeVars"], link["keepTime"]) == (True, True)
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    assert len({panel.title for panel in board.panels}) == len(board.panels)
    for panel in board.panels:
        assert panel.title
        assert panel.description.endswith(".")
        assert panel.unit in UNITS
        assert panel.targets
        assert all(target.legend for target in panel.targets)
    taken = set()
    for place in (panel["gridPos"] for panel in made["panels"]):
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert taken.isdisjoint(cells), "panels do not overlap"
        assert all(0 <= x < 24 for x, _ in cells)
        taken |= cells


def test_a_panel_with_a_limit_turns_red_there():
    shown = {}
    for board in DASHBOARDS:
        for panel in json.loads(board.to_json())["panels"]:
            if limits := panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds"):
                shown[panel["title"]] = [(step["value"], step["color"]) for step in limits["steps"]]
    assert shown["Fill"] == [(None, "green"), (0.9, "red")]
    assert shown["Actors up"] == [(None, "red"), (1, "green")]
    limited = {panel.title for board in DASHBOARDS for panel in board.panels if panel.above or panel.below}
    assert shown.keys() == limited


def braces(expr, at):
    """The text in the braces that follow a position, and what comes behind them."""
    matched = re.match(r"\{([^}]*)\}", expr[at:])
    return (matched[1], expr[at + matched.end() :]) if matched else ("", expr[at:])


@pytest.mark.parametrize(("expr", "legend"), TARGETS, ids=[expr[:60] for expr, _ in TARGETS])
def test_a_query_names_what_there_is(expr, legend):
    names = re.finditer(r"\bedit_ray_\w+", expr)
    for found in names:
        base = re.sub(r"_(bucket|sum|count)$", "", found[0])
        metric = CATALOG[found[0] if found[0] in CATALOG else base]
        selector, behind = braces(expr, found.end())
        assert selector.startswith('job=~"$job",instance=~"$instance"')
        for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
            assert label in metric.labels
            assert value in LABELS[label]
        cumulative = metric.kind != "gauge"
        assert cumulative == behind.startswith(("[$__rate_interval]", "[$__range]"))
        before = expr[: found.start()]
        assert cumulative == before.endswith(("rate(", "increase("))
    by = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expr) for label in group.split(",")}
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) == by - {"le", ""}


def test_every_metric_is_drawn_and_none_is_asked_for_that_is_not():
    drawn = {name for expr, _ in TARGETS for name in re.findall(r"\bedit_ray_\w+", expr)}
    drawn = {name if name in CATALOG else re.sub(r"_(bucket|sum|count)$", "", name) for name in drawn}
    assert drawn == set(CATALOG)
    with pytest.raises(KeyError):
        of("tea_total")
    with pytest.raises(ValueError, match="has no"):
        of("runs", state="lost")


def test_rules_name_what_there_is():
    for expr in (*RECORDED.values(), *(alert.expr for alert in ALERTS)):
        for name in re.findall(r"(?<!:)edit_ray_\w+", expr):
            assert name in CATALOG or re.sub(r"_(bucket|sum|count)$", "", name) in CATALOG
        assert set(re.findall(r"edit_ray:[\w:]+", expr)) <= set(RECORDED)
    names = {"GenerationStalled", "TierNearlyFull", "PrefetchLate", "ActorRestarting", "SegmentFailures", "TargetDown"}
    assert {alert.name for alert in ALERTS} == names


def test_durations_stand_in_one_place():
    assert [span(seconds) for seconds in (0.25, 2, 90, 300)] == ["250ms", "2s", "90s", "5m"]
    text = rules_yaml(Durations(**dict.fromkeys(vars(Durations()), 7)))
    assert set(re.findall(r"(?:\[|^ +for: |interval: )(\w+)(?:\]|$)", text, re.MULTILINE)) == {"7s"}


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    ids=" ".join,
)
def test_promtool_agrees(arguments):
    promtool(*arguments)


def promtool(*arguments):
    command = [need("promtool"), *arguments]
    checked = subprocess.run(command, cwd=MONITORING / "prometheus", capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_selected_run_limits_a_panel_to_the_times_at_which_it_was_live(tmp_path):
    of_instance = 'job="edit_ray",instance="one"'
    series = {
        f"edit_ray_runs{{{of_instance}}}": "1x9",
        f'edit_ray_build_info{{{of_instance},version="0.1.0"}}': "1x9",
        f'edit_ray_run_info{{{of_instance},run_id="mine",policy="none"}}': "_x3 1x2 stale",
    }
    expr = re.sub(r"\$(job|instance)", ".*", while_selected(of("runs")))
    asked = [
        {
            "expr": expr.replace("$run", run),
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f"edit_ray_runs{{{of_instance}}}", "value": 1}] if shown else [],
        }
        for run, minute, shown in (("mine", 1, False), ("mine", 5, True), ("mine", 7, False), (".*", 1, True))
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    cases = [{"interval": "1m", "input_series": inputs, "promql_expr_test": asked}]
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [], "evaluation_interval": "1m", "tests": cases}))
    promtool("test", "rules", str(tmp_path / "test.yml"))


def test_nothing_has_a_password_or_listens_to_everybody():
    compose = (MONITORING / "docker-compose.yaml").read_text()
    assert "GRAFANA_PASSWORD:?" in compose
    assert "0.0.0.0" not in compose
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in re.findall(r"image: (\S+)", compose))


def test_without_a_clone_the_command_says_what_it_needs(tmp_path):
    ignored = shutil.ignore_patterns("node_modules", "*.safetensors")
    shutil.copytree(ROOT / "edit_ray", tmp_path / "edit_ray", ignore=ignored)
    command = [sys.executable, "-c", "from edit_ray.cli.main import main; raise SystemExit(main(['dashboards']))"]
    installed = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "needs a clone" in ran.stderr) == (2, True), ran.stderr
