"""Dashboards as plain data, and their JSON as Grafana reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from monitoring.boards.query import of, rate, total, while_selected

WIDTH, HEIGHT = 24, 8  # of a dashboard in columns, of a panel in rows
SCHEMA_VERSION = 39
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Target:
    """One query; `{{label}}` in the legend stands for a label of its result."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """Queries drawn over time, or (`stat`) their last values as numbers. `unit` is one of Grafana's."""

    title: str
    description: str
    unit: str
    targets: tuple[Target, ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    needs_gpu: bool = False
    needs_door: bool = False  # replicas of the HTTP door, which count requests among Ray's own metrics
    width: int = 8
    above: float | None = None  # a threshold: values from it on are red
    below: float | None = None  # a threshold: values under it are red
    details: str = ""  # the name of the board that the panel links to


@dataclass(frozen=True)
class Row:
    """Panels under one title."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """Rows, as one file of Grafana's."""

    name: str
    title: str
    description: str
    rows: tuple[Row, ...] = field(default_factory=tuple)

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]

    def to_json(self) -> str:
        return json.dumps(_dashboard(self), indent=1, ensure_ascii=False) + "\n"


def panel(title: str, description: str, unit: str, *queries: tuple[str, str], **style: Any) -> Panel:
    """A panel of (expression, legend) pairs while a selected run is live; `style` are fields of `Panel`."""
    targets = tuple(Target(while_selected(expr), legend) for expr, legend in queries)
    return Panel(title, description, unit, targets, **style)


def gauge(title: str, description: str, unit: str, name: str, *by: str, legend: str = "", **style: Any) -> Panel:
    """A panel of one gauge, summed by labels."""
    return panel(title, description, unit, (total(of(name), *by), legend or _legend(by)), **style)


def growth(
    title: str, description: str, unit: str, name: str, *by: str, per_s: int = 1, legend: str = "", **style: Any
) -> Panel:
    """A panel of one counter's growth in `per_s` seconds, summed by labels."""
    expr = rate(name, *by) if per_s == 1 else f"{rate(name, *by)} * {per_s}"
    return panel(title, description, unit, (expr, legend or _legend(by)), **style)


def stat(title: str, description: str, unit: str, expr: str, legend: str, **style: Any) -> Panel:
    """A panel that shows one number."""
    return panel(title, description, unit, (expr, legend), kind="stat", width=6, **style)


def _legend(by: Sequence[str]) -> str:
    return ", ".join(f"{{{{{label}}}}}" for label in by)


def _dashboard(dashboard: Dashboard) -> dict[str, Any]:
    return {
        "uid": f"edit-ray-{dashboard.name}",
        "title": f"EDiT / {dashboard.title}",
        "description": dashboard.description,
        "tags": ["edit_ray"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "fiscalYearStartMonth": 0,
        "liveNow": False,
        "refresh": "10s",
        "timezone": "browser",
        "weekStart": "",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "annotations": {"list": []},
        "links": [_link("dashboards", "EDiT", tags=["edit_ray"])],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0},
                _variable("job", "edit_ray_build_info"),
                _variable("run", 'edit_ray_run_info{job=~"$job"}', "run_id"),
                _variable("instance", 'edit_ray_build_info{job=~"$job"}'),
            ]
        },
        "panels": _panels(dashboard),
    }


def _link(kind: str, title: str, **more: Any) -> dict[str, Any]:
    """A link to other dashboards, which keeps the time range and the variables."""
    shown = {"icon": "dashboard", "tooltip": "", "tags": [], "asDropdown": False, "targetBlank": False}
    return {"title": title, "type": kind, **shown, "includeVars": True, "keepTime": True, **more}


def _variable(name: str, series: str, label: str = "") -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": f"label_values({series}, {label or name})", "refId": f"variable-{name}"},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "refresh": 2,
        "sort": 1,
        "hide": 0,
    }


def _panels(dashboard: Dashboard) -> list[dict[str, Any]]:
    ids, found, y = count(1), [], 0
    for row in dashboard.rows:
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        found.append(
            {"id": next(ids), "type": "row", "title": row.title, "collapsed": False, "gridPos": place} | _EMPTY
        )
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            tall = HEIGHT if panel.kind == "timeseries" else HEIGHT // 2
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            place = {"h": tall, "w": panel.width, "x": x, "y": y}
            found.append({"id": next(ids), **_panel(panel), "gridPos": place})
            x, height = x + panel.width, max(height, tall)
        y += height
    return found


_EMPTY: dict[str, Any] = {"panels": []}


def _panel(panel: Panel) -> dict[str, Any]:
    timeseries = panel.kind == "timeseries"
    thresholds = _thresholds(panel)
    url = f"/d/edit-ray-{panel.details}?${{__url_time_range}}&${{__all_variables}}"
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        **({"links": [_link("link", panel.details.capitalize(), url=url)]} if panel.details else {}),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": target.expr,
                "legendFormat": target.legend,
                "editorMode": "code",
                "range": True,
            }
            for index, target in enumerate(panel.targets)
        ],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                **({"custom": _lines(panel)} if timeseries else {}),
                **({"thresholds": thresholds} if thresholds else {}),
            },
            "overrides": [],
        },
        "options": _timeseries_options() if timeseries else _stat_options(),
    }


def _thresholds(panel: Panel) -> dict[str, Any] | None:
    limit = panel.above if panel.below is None else panel.below
    if limit is None:
        return None
    low, high = ("green", "red") if panel.below is None else ("red", "green")
    return {"mode": "absolute", "steps": [{"color": low, "value": None}, {"color": high, "value": limit}]}


def _lines(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "thresholdsStyle": {"mode": "line" if _thresholds(panel) else "off"},
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }


def _timeseries_options() -> dict[str, Any]:
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _stat_options() -> dict[str, Any]:
    return {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    }
