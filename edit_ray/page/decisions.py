"""The decisions of a cache as HTML: counts, what the policy compared, and a cell for each decision."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from edit_ray.cache.records import Decision, Record
from edit_ray.page.document import document
from edit_ray.page.drawing import Cell, Curve, chart, heat_map
from edit_ray.page.legend import CACHE, COMPARED, legend

_COMPARED = (("signal", "orange", False), ("accumulated", "blue", False), ("threshold", "grey", True))

_BRANCHES = {"cond": "cond, with the prompt", "uncond": "uncond, without it"}


def render_report(records: Mapping[str, Record], title: str) -> str:
    """A page with a section for each record, under its heading."""
    sections = (
        f"<section><h2>{html.escape(name)}</h2>{decisions_of(record)}</section>" for name, record in records.items()
    )
    return document(title, [legend([CACHE, COMPARED]), *sections])


def decisions_of(record: Record) -> str:
    """The decisions of one record, branch by branch."""
    counts = record.counts("expert", "branch")
    rows = "".join(
        f"<tr><td>{html.escape(f'{expert}, {branch}')}</td><td>{count.computed}</td><td>{count.skipped}</td>"
        f"<td>{count.skip_rate:.0%}</td></tr>"
        for (expert, branch), count in counts.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("model, branch", "computed", "reused", "share reused"))
    parts = [f"<table><tr>{head}</tr>{rows}</table>"]
    for branch in dict.fromkeys(decision.branch for decision in record):
        decisions = [decision for decision in record if decision.branch == branch]
        heading = html.escape(_BRANCHES.get(branch, branch))
        parts.append(f"<h3>{heading}</h3>{_compared(decisions, record)}{_cells(decisions, record)}")
    return "".join(parts)


def _compared(decisions: Sequence[Decision], record: Record) -> str:
    """What the policy compared for the first unit, by step; empty if it says nothing."""
    first = [decision for decision in decisions if decision.unit == 0]
    curves = []
    for name, colour, dashed in _COMPARED:
        values: list[float | None] = [None] * record.num_steps
        for decision in first:
            values[decision.step] = getattr(decision, name)
        if any(value is not None for value in values):
            curves.append(Curve(name, colour, values, dashed))
    if not any(value > 0 for curve in curves for value in curve.values if value is not None):
        return ""
    return chart(curves, "", "what the policy compared, by step", of="step")


def _cells(decisions: Sequence[Decision], record: Record) -> str:
    cells = [
        Cell(
            *(d.step, d.unit, d.decision == "reuse"),
            tooltip=f"step {d.step}, {d.expert}, unit {d.unit}: {d.decision} ({d.reason})",
        )
        for d in decisions
    ]
    title = f"{record.num_units} units from top to bottom, {record.num_steps} steps from left to right"
    return heat_map(cells, record.num_steps, record.num_units, title)
