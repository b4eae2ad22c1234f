"""The vocabulary of the segment scheduler: events in, instructions out.

A piece of work is identified by its run, the run's incarnation, its stage, segment and attempt. A report of work that
was not requested, or was requested in another incarnation, is late and changes nothing.
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
"""`waiting`: a segment scheduler has taken the run over from one that died, and cannot continue it yet. `open`: the
run's folder records no end, and no segment scheduler knows the run.
"""
Hold = Literal["pause", "approval", "clients"]
"""What keeps further segments from beginning: a client has paused the run, it waits for a yes to a segment, or it is
`max_ahead` segments ahead of its clients.
"""
Stage = Literal["prepare", "denoise", "decode", "encode", "commit", "finalize"]
FailureKind = Literal["error", "fatal", "death", "no place"]
"""`error`: the work failed, and may succeed the next time. `fatal`: it would fail the same way again. `death`: an actor
died, or a process of one. `no place`: the cluster has no place for the GPU actor.
"""


@dataclass(frozen=True)
class RunSubmitted:
    """A run begins, or continues: segments 0 … `committed`-1 are durable and 0 … `denoised`-1 have latents.

    `worker` is the GPU actor that has worked on it before, if one has. `paused` and `approved` as in `Steered`.
    """

    plan: RunPlan
    committed: int = 0
    denoised: int = 0
    worker: int | None = None
    paused: bool = False
    approved: int = 0


@dataclass(frozen=True)
class WorkersCounted:
    """GPU actors 0 … `count`-1 may be started; `count` never falls.

    One for which the cluster lacked resources before is tried again.
    """

    count: int


@dataclass(frozen=True)
class Consumed:
    """A client has taken segments 0 … `segments`-1."""

    run_id: str
    segments: int


@dataclass(frozen=True)
class Steered:
    """While `paused`, no segment begins that has not begun; segments 0 … `approved`-1 are approved.

    A run is paused also for as long as an edit of what has not begun is being written.
    """

    run_id: str
    paused: bool
    approved: int


@dataclass(frozen=True)
class CancelAsked:
    """A client has asked to cancel the run; it stops after the current step."""

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
    """The work has succeeded; that of the stage `commit`: the segment is durable."""

    work: Work


@dataclass(frozen=True)
class WorkFailed:
    """The work has failed; `error` is one sentence for the user."""

    work: Work
    error: str
    kind: FailureKind = "error"


@dataclass(frozen=True)
class StopWork:
    """All work in flight for this run should end soon, in success or failure."""

    run_id: str
    worker: int


@dataclass(frozen=True)
class CloseRun:
    """The run is over: record it, free its resources. No instruction of this run follows.

    `worker` is None where no GPU actor has worked on it.
    """

    run_id: str
    state: EndState
    error: str | None = None
    worker: int | None = None


Event = RunSubmitted | WorkersCounted | Consumed | Steered | CancelAsked | WorkDone | WorkFailed
Instruction = Work | StopWork | CloseRun
