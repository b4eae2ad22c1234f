"""The vocabulary of the segment scheduler: events go in, instructions come out.

A piece of work is told from every other by its run, the run's incarnation, its stage, segment and attempt. What is
reported of work that was not asked for, or was asked for in another life of the run, is late and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edit_ray.runs.run_plan import RunPlan

EndState = Literal["done", "failed", "cancelled"]
RunState = Literal[
    "queued",
    "preparing",
    "running",
    "paused",
    "waiting",
    "finalizing",
    "stopping",
    "done",
    "failed",
    "cancelled",
    "open",
]
"""`waiting` is a run that a segment scheduler has taken over from one that died, and that cannot go on yet. `open` is
what a run's folder says of one whose end is not recorded and of which no segment scheduler knows.
"""
Stage = Literal["prepare", "denoise", "decode", "encode", "commit", "finalize"]


@dataclass(frozen=True)
class RunSubmitted:
    """A run begins, or goes on: segments 0 … `committed`-1 are durable and 0 … `denoised`-1 have latents.

    `worker` is the GPU actor that has worked on it before, if one has.
    """

    plan: RunPlan
    committed: int = 0
    denoised: int = 0
    worker: int | None = None


@dataclass(frozen=True)
class WorkersCounted:
    """`count` GPU actors may be used, numbered from 0; never fewer than before.

    Those that had no place in the cluster may have one now.
    """

    count: int


@dataclass(frozen=True)
class Consumed:
    """Somebody has taken segments 0 … `segments`-1."""

    run_id: str
    segments: int


@dataclass(frozen=True)
class CancelAsked:
    """The run is to stop between two steps."""

    run_id: str


@dataclass(frozen=True)
class Work:
    """Carry out `stage` on a GPU actor, then answer with `WorkDone` or `WorkFailed`.

    `segment_index` None stands for the run's preparation (model loaded, prompts encoded) or its end (`final.mp4`).
    """

    run_id: str
    incarnation: int
    stage: Stage
    segment_index: int | None
    attempt: int
    worker: int


@dataclass(frozen=True)
class WorkDone:
    """For the stage `commit`: the segment is durable."""

    work: Work


FailureKind = Literal["error", "fatal", "death", "no place"]
"""`error`: the work failed, and may succeed the next time. `fatal`: it would fail the same way again. `death`: an actor
died, or a process of one. `no place`: the cluster has no place for the GPU actor.
"""


@dataclass(frozen=True)
class WorkFailed:
    """`error` is one sentence for the user."""

    work: Work
    error: str
    kind: FailureKind = "error"


Event = RunSubmitted | WorkersCounted | Consumed | CancelAsked | WorkDone | WorkFailed


@dataclass(frozen=True)
class StopWork:
    """Whatever is in flight for this run should end soon, in success or failure."""

    run_id: str
    worker: int


@dataclass(frozen=True)
class CloseRun:
    """The run is over: record it, free what it holds. No instruction of this run follows.

    `worker` is None where no GPU actor has worked on it.
    """

    run_id: str
    state: EndState
    error: str | None = None
    worker: int | None = None


Instruction = Work | StopWork | CloseRun
