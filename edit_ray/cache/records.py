"""What a cache did: every decision, and counts per branch and per unit that grow while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

SCHEMA = 1
Decided = Literal["compute", "reuse"]
Reason = Literal["policy", "plan", "hook", "missing", "probe"]
"""Who decided: the policy, its plan, a hook; or nobody, as the residual was missing or the unit is only its probe."""


@dataclass(frozen=True)
class Decision:
    """One decision of one unit.

    `signal`, `accumulated` and `threshold` are what the policy compared, where it tells.
    """

    step: int
    branch: str
    expert: str
    unit: int
    decision: Decided
    reason: Reason
    signal: float | None = None
    accumulated: float | None = None
    threshold: float | None = None


@dataclass
class Counts:
    """How often units computed, how often they were skipped, and the bytes of their stored residuals."""

    computed: int = 0
    skipped: int = 0
    bytes: int = 0

    @property
    def skip_rate(self) -> float:
        """Share of the decisions that were a skip."""
        return self.skipped / max(1, self.computed + self.skipped)


@dataclass
class Record:
    """The decisions of a call so far, in their order. Iterates over them."""

    num_steps: int
    num_units: int
    decisions: list[Decision] = field(default_factory=list)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def put_in_order(self) -> None:
        """By step, then branch: where the branches are computed at the same time, theirs come as they are made."""
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
        """The record as JSON: `num_steps`, `num_units`, and one object a decision."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "num_steps": self.num_steps,
                "num_units": self.num_units,
                "decisions": [asdict(decision) for decision in self.decisions],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Record:
        """A record as `to_json` wrote it; raises ValueError for anything else."""
        try:
            content = json.loads(text)
            if content["schema"] != SCHEMA:
                raise ValueError(f"its schema is {content['schema']!r}, and the one known here is {SCHEMA}")
            decisions = [Decision(**decision) for decision in content["decisions"]]
            record = cls(content["num_steps"], content["num_units"], decisions)
        except (KeyError, TypeError, ValueError, RecursionError) as broken:
            raise ValueError(f"this is no record of cache decisions: {broken!r}") from None
        if not _is_count(record.num_steps) or not _is_count(record.num_units):
            raise ValueError("this is no record of cache decisions: num_steps and num_units must be whole numbers")
        for decision in record:
            if not record._admits(decision):
                raise ValueError(f"this is no record of cache decisions: one in it is {decision}")
        return record

    def _admits(self, decision: Decision) -> bool:
        numbers = (decision.signal, decision.accumulated, decision.threshold)
        return (
            (_is_count(decision.step) and decision.step < self.num_steps)
            and (_is_count(decision.unit) and decision.unit < self.num_units)
            and (isinstance(decision.branch, str) and isinstance(decision.expert, str))
            and (decision.decision in get_args(Decided) and decision.reason in get_args(Reason))
            and all(x is None or (type(x) in (int, float) and -1e300 < x < 1e300) for x in numbers)
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
