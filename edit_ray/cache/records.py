"""What a cache did: every decision and counts of them, also as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
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

    @classmethod
    def joined(cls, records: Sequence[Record]) -> Record:
        """The record of several calls of one pipeline as one, whose steps follow each other."""
        whole = cls(sum(each.num_steps for each in records), max((each.num_units for each in records), default=0))
        first = 0
        for each in records:
            whole.decisions += [replace(decision, step=first + decision.step) for decision in each]
            first += each.num_steps
        return whole

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
