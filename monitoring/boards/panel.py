"""Dashboards as plain data, and their JSON as Grafana reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

WIDTH, HEIGHT = 24, 8  # of a dashboard in columns, of a panel in rows
SCHEMA_VERSION = 39
_LINKS = {  # the other boards, for the same time and the same jobs and instances
    "title": "EDiT",
    "type": "dashboards",
    "tags": ["edit_ray"],
    "icon": "external link",
    "tooltip": "",
    "asDropdown": True,
    "targetBlank": False,
    "includeVars": True,
    "keepTime": True,
}
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
    width: int = 8
    above: float | None = None  # a threshold: beyond it is trouble


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
        "links": [_LINKS],
        "templating": {"list": [_datasource(), _variable("job"), _variable("instance", ',job=~"$job"')]},
        "panels": _panels(dashboard),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(label: str, among: str = "") -> dict[str, Any]:
    query = f"label_values(edit_ray_build_info{{{among.removeprefix(',')}}}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": f"variable-{label}"},
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
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
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
                **({} if panel.above is None else {"thresholds": _thresholds(panel.above)}),
            },
            "overrides": [],
        },
        "options": _timeseries_options() if timeseries else _stat_options(),
    }


def _thresholds(above: float) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": "green", "value": None}, {"color": "red", "value": above}]}


def _lines(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "thresholdsStyle": {"mode": "off" if panel.above is None else "line"},
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
