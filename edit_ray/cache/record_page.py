"""The record of a cache as one HTML page: what it measured and what it decided. The page is self-contained."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from edit_ray.cache.records import Decision, Record

_STEP_PX, _UNIT_PX, _CHART_PX, _LEFT_PX = 18, 12, 160, 64
_COLOURS = {"compute": "#2b6cb0", "reuse": "#e2e8f0"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a202c; }
h2 { margin-top: 2.5rem; } h3 { font-weight: 600; margin-bottom: .3rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } svg { display: block; max-width: 100%; height: auto; }
text { font: 11px system-ui, sans-serif; fill: #4a5568; } .key { display: inline-block; width: .8em; height: .8em; }
"""


def render_report(records: Mapping[str, Record], title: str) -> str:
    """A page with one section for each of `records`, by their headings."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{decision_sections(records)}</html>\n"
    )


def decision_sections(records: Mapping[str, Record]) -> str:
    """The sections alone, for a larger page that includes `STYLE`."""
    sections = "".join(_section(heading, record) for heading, record in records.items())
    keys = " ".join(
        f'<span class="key" style="background:{colour}"></span> {decision}' for decision, colour in _COLOURS.items()
    )
    return f"<p>{keys}. Hover over a cell for the reason of a decision.</p>{sections}"


def _section(heading: str, record: Record) -> str:
    counts = record.counts("expert", "branch")
    rows = "".join(
        f"<tr><td>{html.escape(f'{expert}, {branch}')}</td><td>{count.computed}</td><td>{count.skipped}</td>"
        f"<td>{count.skip_rate:.0%}</td></tr>"
        for (expert, branch), count in counts.items()
    )
    table = f"<table><tr><th></th><th>computed</th><th>skipped</th><th>skip rate</th></tr>{rows}</table>"
    parts = []
    for branch in dict.fromkeys(decision.branch for decision in record):
        decisions = [decision for decision in record if decision.branch == branch]
        parts.append(f"<h3>{html.escape(branch)}</h3>{_chart(decisions, record)}{_heat_map(decisions, record)}")
    return f"<h2>{html.escape(heading)}</h2>{table}{''.join(parts)}"


def _chart(decisions: Sequence[Decision], record: Record) -> str:
    """Signal, accumulated value and threshold of the first unit over the steps; empty if the policy sets none."""
    first = [decision for decision in decisions if decision.unit == 0]
    lines = {
        name: [(d.step, float(getattr(d, name))) for d in first if getattr(d, name) is not None]
        for name in ("signal", "accumulated", "threshold")
    }
    top = max((value for points in lines.values() for _, value in points), default=0.0)
    if top <= 0:
        return ""
    colours = {"signal": "#dd6b20", "accumulated": "#2f855a", "threshold": "#a0aec0"}
    drawn, labels = [], []
    for index, (name, points) in enumerate(lines.items()):
        if points:
            path = " ".join(
                f"{_LEFT_PX + (step + 0.5) * _STEP_PX:.1f},{_CHART_PX * (1 - max(0.0, value) / top) + 8:.1f}"
                for step, value in points
            )
            drawn.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.5"/>')
            x = _LEFT_PX + 4 + 96 * index
            labels.append(f'<text x="{x}" y="{_CHART_PX + 24}" style="fill:{colours[name]}">{name}</text>')
    axis = f'<text x="0" y="14">{top:.3g}</text><text x="0" y="{_CHART_PX + 8}">0</text>'
    return _svg(record.num_steps, _CHART_PX + 32, [axis, *drawn, *labels])


def _heat_map(decisions: Iterable[Decision], record: Record) -> str:
    """Units from top to bottom, steps from left to right."""
    cells = [
        f'<rect x="{_LEFT_PX + d.step * _STEP_PX}" y="{d.unit * _UNIT_PX}" width="{_STEP_PX - 1}" '
        f'height="{_UNIT_PX - 1}" fill="{_COLOURS[d.decision]}"><title>step {d.step}, {html.escape(d.expert)}, '
        f"unit {d.unit}: {d.decision} ({d.reason})</title></rect>"
        for d in decisions
    ]
    height = record.num_units * _UNIT_PX
    axis = f'<text x="0" y="{_UNIT_PX - 2}">unit 0</text>' + "".join(
        f'<text x="{_LEFT_PX + step * _STEP_PX}" y="{height + 14}">{step}</text>'
        for step in range(0, record.num_steps, 5)
    )
    return _svg(record.num_steps, height + 20, [axis, *cells])


def _svg(num_steps: int, height: float, parts: Sequence[str]) -> str:
    width = _LEFT_PX + num_steps * _STEP_PX
    return f'<svg width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}">{"".join(parts)}</svg>'
