"""The vocabulary of the segment scheduler: events go in, instructions come out.

Work carries the `attempt` that asked for it; an event of another attempt is stale and changes nothing.
`segment_index` None stands for the run's preparation (model loaded, prompts encoded) or its end (`final.mp4`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edit_ray.runs.plan import RunPlan

EndState = Literal["done", "failed", "cancelled"]
RunState = Literal["queued", "preparing", "running", "finalizing", "stopping", "done", "failed", "cancelled"]
Stage = Literal["prepare", "denoise", "decode", "commit", "finalize"]


@dataclass(frozen=True)
class RunSubmitted:
    plan: RunPlan


@dataclass(frozen=True)
class CancelAsked:
    run_id: str


@dataclass(frozen=True)
class WorkDone:
    """An instruction was carried out; for `stage="commit"` the segment is durable."""

    run_id: str
    stage: Stage
    segment_index: int | None
    attempt: int


@dataclass(frozen=True)
class WorkFailed:
    """An instruction failed; with `fatal` another attempt would fail the same way."""

    run_id: str
    stage: Stage
    segment_index: int | None
    attempt: int
    error: str
    fatal: bool = False


Event = RunSubmitted | CancelAsked | WorkDone | WorkFailed


@dataclass(frozen=True)
class Work:
    """Carry out `stage`, then answer with `WorkDone` or `WorkFailed` of the same run, segment and attempt."""

    run_id: str
    stage: Stage
    segment_index: int | None
    attempt: int


@dataclass(frozen=True)
class StopWork:
    """Whatever is in flight for this run should end soon, in success or failure."""

    run_id: str


@dataclass(frozen=True)
class CloseRun:
    """The run is over: record it, free what it holds. No instruction of this run follows."""

    run_id: str
    state: EndState
    error: str | None = None


Instruction = Work | StopWork | CloseRun
