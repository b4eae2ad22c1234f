"""The segment scheduler: a plain state machine without a clock or I/O. Its shell acts and reports.

Each run gets one GPU actor, in the order of submission, and keeps it until it ends. A run whose GPU actor has no place
in the cluster waits for another.

Inside a run segments are denoised in order, decoded in order, encoded in order and committed in order. Segment k + 1 is
denoised while k is decoded and encoded, and never further ahead: denoising k waits until k - 2 is committed. What has
begun is finished whatever holds the run; an edit of its storyboard holds from what has not begun.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    Consumed,
    EndState,
    Event,
    FailureKind,
    Hold,
    Instruction,
    RunState,
    RunSubmitted,
    Stage,
    Steered,
    StopWork,
    Work,
    WorkDone,
    WorkersCounted,
    WorkFailed,
)
from edit_ray.runs.run_plan import RunPlan

LEAD = 2  # segments that may be denoised and not yet committed
_BEFORE: dict[Stage, Stage] = {"commit": "encode", "encode": "decode", "decode": "denoise"}
MOST_DEATHS = 10  # of actors during one piece of work; with one more the work is regarded as their cause


@dataclass
class ScheduledRun:
    """A run that has not ended. `worker` is its GPU actor, which it keeps unless that one finds no place."""

    plan: RunPlan
    made: dict[Stage, int]  # by stage: of how many segments it is done; its next segment has that index
    worker: int | None = None
    state: RunState = "queued"
    consumed: int = 0  # a client has taken segments 0 … consumed-1
    begun: int = 0  # the denoising of segments 0 … begun-1 has begun, in this life or an earlier one
    paused: bool = False
    approved: int = 0  # segments 0 … approved-1
    in_flight: dict[Stage, Work] = field(default_factory=dict)
    failures: defaultdict[tuple[Stage, int | None], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    error: str | None = None
    end: EndState = "cancelled"  # what the run becomes once stopped

    @property
    def shown_state(self) -> RunState:
        """Its state for clients: `paused` where it only waits for one of them."""
        return "paused" if self.state == "running" and not self.in_flight else self.state

    @property
    def held_by(self) -> Hold | None:
        """What must change before a further segment begins, or before the run finishes."""
        if self.state in ("finalizing", "stopping"):
            return None
        if self.paused and not self._all_committed:
            return "pause"
        if self.plan.approve and self.approved < self.made["commit"]:
            return "approval"
        most = self.plan.max_ahead
        return (
            "clients" if most is not None and not self._all_committed and self.begun >= self.consumed + most else None
        )

    @property
    def rests(self) -> bool:
        """Whether it has no work for a GPU actor until it is unpaused."""
        return self.state == "queued" and self.paused and not self._all_committed

    def begin(self) -> list[Work]:
        """All work that can begin now, in the order of what viewers wait for."""
        begun, run_id, incarnation = [], self.plan.run_id, self.plan.incarnation
        for stage in self._ready():
            if stage not in self.in_flight:
                assert self.worker is not None, f"{stage} of a run that has no GPU actor"
                segment_index = self.made.get(stage)
                attempt = self.failures.get((stage, segment_index), Counter()).total()
                work = self.in_flight[stage] = Work(run_id, incarnation, stage, segment_index, attempt, self.worker)
                if stage == "denoise":
                    self.begun = max(self.begun, self.made[stage] + 1)
                begun.append(work)
        return begun

    def done(self, stage: Stage) -> None:
        """The work in flight for this stage has succeeded."""
        del self.in_flight[stage]
        if stage in self.made:
            self.made[stage] += 1
        elif stage == "finalize":
            self.state, self.end, self.error = "stopping", "done", None
        elif self.state == "preparing":
            self.state = "running"

    def failed(self, stage: Stage, error: str, kind: FailureKind) -> str | None:
        """The work in flight for this stage has failed; returns the reason if the run cannot continue.

        Deaths of actors have a bound of their own: most are not caused by the work that they interrupt.
        """
        segment_index = self.in_flight.pop(stage).segment_index
        counts = self.failures[stage, segment_index]
        counts[kind] += 1
        what = stage if segment_index is None else f"{stage} of segment {segment_index}"
        if kind == "fatal":
            return f"{what} failed: {error}"
        if kind == "death":
            cause = f"actors died {counts[kind]} times during this work, which may be why (is memory short?)"
            return f"{what} failed: {cause}: {error}" if counts[kind] > MOST_DEATHS else None
        failures, most = counts["error"] + counts["no place"], self.plan.retries + 1
        return f"{what} failed (attempt {failures} of {most}): {error}" if failures >= most else None

    def displaced(self, stage: Stage) -> None:
        """Its GPU actor has no place: the run waits for another one, which begins with the preparation."""
        for again in {(stage, self.in_flight.pop(stage).segment_index), ("prepare", None)}:
            self.failures[again]["displaced"] += 1  # so that it counts as another attempt
        self.state = "queued"

    @property
    def _all_committed(self) -> bool:
        return self.plan.num_segments is not None and self.made["commit"] >= self.plan.num_segments

    def _ready(self) -> Iterator[Stage]:
        if self.state == "running" and self._all_committed and self._approved(self.made["commit"]):
            self.state = "finalizing"
        if self.state == "preparing":
            yield "prepare"
        elif self.state == "finalizing":
            yield "finalize"
        elif self.state == "running":
            for stage, before in _BEFORE.items():
                if self.made[stage] < self.made[before]:
                    yield stage
            if self._may_denoise():
                yield "denoise"

    def _may_denoise(self) -> bool:
        plan, k = self.plan, self.made["denoise"]
        return (
            (plan.num_segments is None or k < plan.num_segments)
            and k < self.made["commit"] + LEAD
            and (plan.max_ahead is None or k < self.consumed + plan.max_ahead)
            and (not plan.frames_first or k <= self.made["decode"])
            and (k < self.begun or (not self.paused and self._approved(k)))
        )

    def _approved(self, segments: int) -> bool:
        return not self.plan.approve or self.approved >= segments


class SegmentScheduler:
    """Events in, instructions out. `handle` is the only mutator."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._lacking: set[int] = set()  # GPU actors without a place in the cluster, when they were last counted
        self._runs: dict[str, ScheduledRun] = {}  # those that have not ended, in the order of submission

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event. Late reports of runs and work that have ended change nothing.

        Raises ValueError for the submission of a run that has not ended.
        """
        match event:
            case RunSubmitted():
                return self._submit(event)
            case WorkersCounted(count):
                self._workers = max(self._workers, count)
                self._lacking.clear()
                return self._advance()
            case Consumed(run_id, segments):
                run = self._runs.get(run_id)
                if run is None or segments <= run.consumed:
                    return []
                run.consumed = segments
                return self._advance()
            case Steered(run_id, paused, approved):
                return self._steer(run_id, paused, approved)
            case CancelAsked(run_id):
                return self._stop(run_id, "cancelled", None)
            case WorkDone(work) if self._in_flight(work):
                run = self._runs[work.run_id]
                run.done(work.stage)
                return self._close_if_still(run) if run.state == "stopping" else self._advance()
            case WorkFailed(work, error, kind) if self._in_flight(work):
                return self._failed(work, error, kind)
        return []

    def state(self, run_id: str) -> RunState | None:
        """The state of a run; None once it has ended."""
        run = self._runs.get(run_id)
        return run.shown_state if run else None

    def at_work(self, run_id: str) -> tuple[tuple[Stage, int | None], ...]:
        """The stages of a run that are in flight, each with its segment."""
        run = self._runs.get(run_id)
        return tuple((work.stage, work.segment_index) for work in run.in_flight.values()) if run else ()

    def held_by(self, run_id: str) -> Hold | None:
        """What keeps a further segment of a run from beginning, if anything does."""
        run = self._runs.get(run_id)
        return run.held_by if run else None

    def begun(self, run_id: str) -> int | None:
        """The first segment whose denoising has not begun; None if the run is about to end or has ended."""
        run = self._runs.get(run_id)
        return None if run is None or run.state == "stopping" else run.begun

    @property
    def idle(self) -> bool:
        """True when every run has ended."""
        return not self._runs

    def _submit(self, submitted: RunSubmitted) -> list[Instruction]:
        plan, worker = submitted.plan, submitted.worker
        if plan.run_id in self._runs:
            raise ValueError(f"run {plan.run_id!r} was submitted before, and lives")
        if worker is not None and (worker >= self._workers or worker in self._taken()):
            worker = None
        made: dict[Stage, int] = dict.fromkeys(("decode", "encode", "commit"), submitted.committed)
        made["denoise"] = max(submitted.denoised, submitted.committed)
        run = ScheduledRun(plan, made, worker)
        run.begun, run.paused, run.approved = made["denoise"], submitted.paused, submitted.approved
        self._runs[plan.run_id] = run
        return self._advance()

    def _steer(self, run_id: str, paused: bool, approved: int) -> list[Instruction]:
        run = self._runs.get(run_id)
        if run is None:
            return []
        run.paused, run.approved = paused, max(run.approved, approved)
        return self._advance()

    def _in_flight(self, work: Work) -> bool:
        run = self._runs.get(work.run_id)
        return run is not None and run.in_flight.get(work.stage) == work

    def _failed(self, work: Work, error: str, kind: FailureKind) -> list[Instruction]:
        run = self._runs[work.run_id]
        if kind == "no place" and run.state != "stopping" and self._others_have_places(work.worker):
            self._lacking.add(work.worker)
            run.displaced(work.stage)
            return self._advance()
        reason = run.failed(work.stage, error, kind)
        if run.state == "stopping":
            return self._close_if_still(run)
        return self._advance() if reason is None else self._stop(work.run_id, "failed", reason)

    def _stop(self, run_id: str, end: EndState, error: str | None) -> list[Instruction]:
        run = self._runs.get(run_id)
        if run is None or run.state == "stopping":
            return []
        run.state, run.end, run.error = "stopping", end, error
        if run.in_flight and run.worker is not None:
            return [StopWork(run_id, run.worker)]
        return self._close_if_still(run)

    def _close_if_still(self, run: ScheduledRun) -> list[Instruction]:
        """Ends the run once nothing of it is in flight, so that the next one can begin."""
        if run.in_flight:
            return []
        del self._runs[run.plan.run_id]
        return [CloseRun(run.plan.run_id, run.end, run.error, run.worker), *self._advance()]

    def _advance(self) -> list[Instruction]:
        """Gives GPU actors to runs that wait for one, then begins all work that can begin."""
        instructions: list[Instruction] = []
        for run in self._runs.values():
            if run.state == "queued" and not run.in_flight and not run.rests:
                if run.worker in self._lacking | self._taken(but=run):
                    run.worker = None
                free = [worker for worker in range(self._workers) if worker not in self._taken() | self._lacking]
                if run.worker is None and free:
                    run.worker = free[0]
                if run.worker is not None:
                    run.state = "preparing"
            instructions += run.begin()
        return instructions

    def _others_have_places(self, worker: int) -> bool:
        return any(other not in self._lacking for other in range(self._workers) if other != worker)

    def _taken(self, but: ScheduledRun | None = None) -> set[int]:
        """The GPU actors of all runs but one. A run that rests lets others have its own."""
        kept = (run for run in self._runs.values() if run is not but and not run.rests)
        return {run.worker for run in kept if run.worker is not None}
