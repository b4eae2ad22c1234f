"""What runs next: a plain state machine, no clock, no I/O. Its shell carries the instructions out and reports back.

Runs take turns in the order of submission. Inside a run segments are denoised in order, decoded in order and committed
in order; segment k + 1 is denoised while k is decoded, and never further ahead than that: denoising k waits until k - 2
is committed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from edit_ray.runs.events import (
    CancelAsked,
    CloseRun,
    EndState,
    Event,
    Instruction,
    RunState,
    RunSubmitted,
    Stage,
    StopWork,
    Work,
    WorkDone,
    WorkFailed,
)
from edit_ray.runs.plan import RunPlan

LEAD = 2  # segments that may be denoised and not yet committed


@dataclass
class _Run:
    plan: RunPlan
    state: RunState = "queued"
    denoised: int = 0  # segments 0 … denoised-1 have latents
    decoded: int = 0
    committed: int = 0
    in_flight: dict[Stage, int] = field(default_factory=dict)  # stage -> attempt
    failures: dict[tuple[Stage, int | None], int] = field(default_factory=dict)
    error: str | None = None
    end: EndState = "cancelled"  # what the run becomes once stopped

    def segment_of(self, stage: Stage) -> int | None:
        """The one segment that `stage` works on next, or works on now."""
        return {"denoise": self.denoised, "decode": self.decoded, "commit": self.committed}.get(stage)


class SegmentScheduler:
    """Events in, instructions out. `handle` is the only mutator."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        self._queue: deque[str] = deque()  # the head is the active run

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event. Unknown runs, ended runs and stale attempts change nothing.

        Raises ValueError for a run id that was submitted before.
        """
        match event:
            case RunSubmitted(plan):
                return self._submit(plan)
            case CancelAsked(run_id):
                return self._stop(run_id, "cancelled", None)
            case WorkDone(run_id, stage, segment_index, attempt):
                return self._done(run_id, stage) if self._current(run_id, stage, segment_index, attempt) else []
            case WorkFailed(run_id, stage, segment_index, attempt, error, fatal):
                if not self._current(run_id, stage, segment_index, attempt):
                    return []
                return self._failed(run_id, stage, segment_index, error, fatal)

    def state(self, run_id: str) -> RunState | None:
        run = self._runs.get(run_id)
        return run.state if run else None

    def error(self, run_id: str) -> str | None:
        run = self._runs.get(run_id)
        return run.error if run else None

    def committed(self, run_id: str) -> int:
        """How many segments of the run are durable: 0 … committed-1."""
        return self._runs[run_id].committed

    @property
    def idle(self) -> bool:
        """True when no run is queued or at work."""
        return not self._queue

    def forget(self, run_id: str) -> None:
        """Drops what is remembered of an ended run."""
        if self._runs[run_id].state in ("done", "failed", "cancelled"):
            del self._runs[run_id]

    def _submit(self, plan: RunPlan) -> list[Instruction]:
        if plan.run_id in self._runs:
            raise ValueError(f"run {plan.run_id!r} was submitted before")
        self._runs[plan.run_id] = _Run(plan)
        self._queue.append(plan.run_id)
        return self._advance()

    def _current(self, run_id: str, stage: Stage, segment_index: int | None, attempt: int) -> bool:
        run = self._runs.get(run_id)
        return (
            run is not None
            and stage in run.in_flight
            and run.in_flight[stage] == attempt
            and run.segment_of(stage) == segment_index
        )

    def _done(self, run_id: str, stage: Stage) -> list[Instruction]:
        run = self._runs[run_id]
        del run.in_flight[stage]
        match stage:
            case "prepare":
                run.state = "running" if run.state == "preparing" else run.state
            case "denoise":
                run.denoised += 1
            case "decode":
                run.decoded += 1
            case "commit":
                run.committed += 1
            case "finalize":
                run.state, run.end = "stopping", "done"
        return self._close_if_still(run) if run.state == "stopping" else self._advance()

    def _failed(
        self, run_id: str, stage: Stage, segment_index: int | None, error: str, fatal: bool
    ) -> list[Instruction]:
        run = self._runs[run_id]
        del run.in_flight[stage]
        if run.state == "stopping":
            return self._close_if_still(run)
        failures = run.failures[stage, segment_index] = run.failures.get((stage, segment_index), 0) + 1
        if fatal or failures > run.plan.retries:
            where = "" if segment_index is None else f" of segment {segment_index}"
            again = "" if fatal else f" (attempt {failures} of {run.plan.retries + 1})"
            return self._stop(run_id, "failed", f"{stage}{where} failed{again}: {error}")
        return self._advance()

    def _stop(self, run_id: str, end: EndState, error: str | None) -> list[Instruction]:
        run = self._runs.get(run_id)
        if run is None or run_id not in self._queue or run.state == "stopping":
            return []
        run.state, run.end, run.error = "stopping", end, error
        stop: list[Instruction] = [StopWork(run_id)] if run.in_flight else []
        return stop + self._close_if_still(run)

    def _close_if_still(self, run: _Run) -> list[Instruction]:
        """Ends the run once nothing of it is in flight, and lets the next one begin."""
        if run.in_flight:
            return []
        run.state = run.end
        self._queue.remove(run.plan.run_id)
        return [CloseRun(run.plan.run_id, run.end, run.error), *self._advance()]

    def _advance(self) -> list[Instruction]:
        """All work that the active run can begin now, what is nearest to the viewer first."""
        if not self._queue:
            return []
        run = self._runs[self._queue[0]]
        total = len(run.plan.segments)
        if run.state == "queued":
            run.state = "preparing"
        ready: dict[Stage, bool] = {
            "prepare": run.state == "preparing",
            "commit": run.state == "running" and run.committed < run.decoded,
            "decode": run.state == "running" and run.decoded < run.denoised,
            "denoise": run.state == "running" and run.denoised < min(total, run.committed + LEAD),
            "finalize": run.state in ("running", "finalizing") and run.committed == total,
        }
        if ready["finalize"]:
            run.state = "finalizing"
        return [self._begin(run, stage) for stage, is_ready in ready.items() if is_ready and stage not in run.in_flight]

    def _begin(self, run: _Run, stage: Stage) -> Work:
        segment_index = run.segment_of(stage)
        attempt = run.failures.get((stage, segment_index), 0)
        run.in_flight[stage] = attempt
        return Work(run.plan.run_id, stage, segment_index, attempt)
