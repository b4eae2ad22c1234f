"""What a cache did: every decision, counts of them, and both as JSON and as a self-contained HTML page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from edit_ray.cache.policies.policy import PolicyContext

SCHEMA = 1
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)  # of records that are read

Count = Annotated[int, Field(ge=0)]
Compared = Annotated[float, Field(gt=-1e300, lt=1e300)] | None
Decided = Literal["compute", "reuse"]
Reason = Literal["policy", "plan", "hook", "missing", "probe", "gate"]
"""The decider: the policy, its known mask ("plan"), a hook; a missing residual; a unit that is only a probe; or the CFG
gate, which leaves out the whole forward."""


@dataclass(frozen=True)
class Decision:
    """One decision of one unit. `signal`, `accumulated` and `threshold` are what the policy has compared, if known."""

    step: Count
    branch: str
    expert: str
    unit: Count
    decision: Decided
    reason: Reason
    signal: Compared = None
    accumulated: Compared = None
    threshold: Compared = None
    __pydantic_config__ = _STRICT


@dataclass
class Counts:
    """Decisions to compute, decisions to skip, and the bytes of stored residuals."""

    computed: int = 0
    skipped: int = 0
    bytes: int = 0

    @property
    def skip_rate(self) -> float:
        """Share of the decisions that were a skip."""
        return self.skipped / max(1, self.computed + self.skipped)


@dataclass
class Record:
    """The decisions of a call so far, in order. Iterates over them."""

    num_steps: Count
    num_units: Count
    decisions: list[Decision] = field(default_factory=list)
    __pydantic_config__ = ConfigDict(strict=True)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def note(self, ctx: PolicyContext, decision: Decided, reason: Reason) -> None:
        """Add the decision of a unit at its step, without values that are not finite: JSON has no infinities."""
        compared = {name: getattr(ctx, name) for name in ("signal", "accumulated", "threshold")}
        finite = {name: value for name, value in compared.items() if value is not None and math.isfinite(value)}
        self.decisions.append(
            Decision(ctx.step, ctx.branch, ctx.expert, ctx.unit_index, decision=decision, reason=reason, **finite)
        )

    def note_gated(self, expert: str, branch: str, step: int, num_units: int) -> None:
        """Add the decisions of a forward that the CFG gate left out."""
        self.decisions += [
            Decision(step, branch, expert, unit, decision="reuse", reason="gate") for unit in range(num_units)
        ]

    def put_in_order(self) -> None:
        """Sort by step, then branch: branches computed in two threads interleave."""
        self.decisions.sort(key=lambda decision: (decision.step, decision.branch))

    def mask(self, branch: str = "cond", unit: int = 0) -> list[bool]:
        """True where the unit computed, by step, over all experts."""
        return [d.decision == "compute" for d in self.decisions if d.branch == branch and d.unit == unit]

    def counts(self, *by: str) -> dict[tuple[str | int, ...], Counts]:
        """Counts by the values of fields of `Decision`, without bytes."""
        result: dict[tuple[str | int, ...], Counts] = {}
        for decision in self.decisions:
            count = result.setdefault(tuple(getattr(decision, name) for name in by), Counts())
            if decision.decision == "compute":
                count.computed += 1
            else:
                count.skipped += 1
        return result

    def to_json(self) -> str:
        """The record as JSON: `num_steps`, `num_units`, and an object for each decision."""
        return json.dumps({"schema": SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Record:
        """A record as `to_json` wrote it; raises ValueError for anything else."""
        try:
            content = json.loads(text)
            if content["schema"] != SCHEMA or "decisions" not in content:
                raise ValueError(
                    f"schema {SCHEMA} with decisions is known here, and its schema is {content['schema']!r}"
                )
            record = TypeAdapter(cls).validate_json(text)
            if beyond := [d for d in record if d.step >= record.num_steps or d.unit >= record.num_units]:
                raise ValueError(f"of {record.num_steps} steps and {record.num_units} units, one in it is {beyond[0]}")
        except ValidationError as broken:
            first = broken.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"this is not a record of cache decisions: {where}: {first['msg']}") from None
        except (KeyError, TypeError, ValueError, RecursionError) as broken:
            raise ValueError(f"this is not a record of cache decisions: {broken!r}") from None
        return record


# The page

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
    """A page with a section for each record, under its heading."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{decision_sections(records)}</html>\n"
    )


def decision_sections(records: Mapping[str, Record]) -> str:
    """The sections without the page, for a larger page that includes `STYLE`."""
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
    """Signal, accumulated value and threshold of the first unit by step; empty if the policy sets none."""
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
