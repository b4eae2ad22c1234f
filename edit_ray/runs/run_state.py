"""Where one run stands, and what of it can begin now.

Inside a run segments are denoised in order, decoded in order, encoded in order and committed in order. Segment k + 1 is
denoised while k is decoded and encoded, and never further ahead than that: denoising k waits until k - 2 is committed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from edit_ray.runs.events import EndState, RunState, Stage, Work
from edit_ray.runs.plan import RunPlan

LEAD = 2  # segments that may be denoised and not yet committed


@dataclass
class ScheduledRun:
    """A run that has not ended. `worker` is its GPU actor as soon as it has one, and stays so."""

    plan: RunPlan
    committed: int = 0  # segments 0 … committed-1 are durable
    denoised: int = 0  # segments 0 … denoised-1 have latents
    worker: int | None = None
    state: RunState = "queued"
    decoded: int = field(init=False)
    encoded: int = field(init=False)
    consumed: int = 0  # segments 0 … consumed-1 were taken by a client
    in_flight: dict[Stage, Work] = field(default_factory=dict)
    failures: dict[tuple[Stage, int | None], int] = field(default_factory=dict)
    error: str | None = None
    end: EndState = "cancelled"  # what the run becomes once stopped

    def __post_init__(self) -> None:
        self.decoded = self.encoded = self.committed

    @property
    def shown_state(self) -> RunState:
        """`paused` where it waits for a client alone."""
        held = self.state == "running" and not self.in_flight and not self._all_committed
        return "paused" if held else self.state

    def begin(self) -> list[Work]:
        """All work that can begin now, what is nearest to the viewer first."""
        return [self._work(stage) for stage in self._ready() if stage not in self.in_flight]

    def done(self, stage: Stage) -> None:
        """The work in flight for this stage has succeeded."""
        del self.in_flight[stage]
        match stage:
            case "prepare" if self.state == "preparing":
                self.state = "running"
            case "denoise":
                self.denoised += 1
            case "decode":
                self.decoded += 1
            case "encode":
                self.encoded += 1
            case "commit":
                self.committed += 1
            case "finalize":
                self.state, self.end, self.error = "stopping", "done", None

    def failed(self, stage: Stage, error: str, fatal: bool) -> str | None:
        """The work in flight for this stage has failed; returns why the run cannot go on, if it cannot."""
        segment_index = self.in_flight.pop(stage).segment_index
        failures = self.failures[stage, segment_index] = self.failures.get((stage, segment_index), 0) + 1
        if not fatal and failures <= self.plan.retries:
            return None
        where = "" if segment_index is None else f" of segment {segment_index}"
        again = "" if fatal else f" (attempt {failures} of {self.plan.retries + 1})"
        return f"{stage}{where} failed{again}: {error}"

    @property
    def _all_committed(self) -> bool:
        return self.plan.num_segments is not None and self.committed >= self.plan.num_segments

    def _ready(self) -> Iterator[Stage]:
        if self.state == "preparing":
            yield "prepare"
        elif self.state == "running" and self._all_committed:
            self.state = "finalizing"
        if self.state == "running":
            if self.committed < self.encoded:
                yield "commit"
            if self.encoded < self.decoded:
                yield "encode"
            if self.decoded < self.denoised:
                yield "decode"
            if self._may_denoise():
                yield "denoise"
        elif self.state == "finalizing":
            yield "finalize"

    def _may_denoise(self) -> bool:
        plan, k = self.plan, self.denoised
        return (
            (plan.num_segments is None or k < plan.num_segments)
            and k < self.committed + LEAD
            and (plan.max_ahead is None or k < self.consumed + plan.max_ahead)
            and (not plan.frames_first or k <= self.decoded)
        )

    def _work(self, stage: Stage) -> Work:
        index = {"denoise": self.denoised, "decode": self.decoded, "encode": self.encoded, "commit": self.committed}
        segment_index = index.get(stage)
        attempt = self.failures.get((stage, segment_index), 0)
        assert self.worker is not None, f"{stage} of a run that has no GPU actor"
        self.in_flight[stage] = Work(
            self.plan.run_id, self.plan.incarnation, stage, segment_index, attempt, self.worker
        )
        return self.in_flight[stage]
