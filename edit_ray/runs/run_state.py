"""Where one run stands, and what of it can begin now.

Inside a run segments are denoised in order, decoded in order, encoded in order and committed in order. Segment k + 1 is
denoised while k is decoded and encoded, and never further ahead than that: denoising k waits until k - 2 is committed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from edit_ray.runs.events import EndState, FailureKind, RunState, Stage, Work
from edit_ray.runs.plan import RunPlan

LEAD = 2  # segments that may be denoised and not yet committed
MOST_DEATHS = 10  # of actors during one piece of work; one more, and the work is taken for their cause


@dataclass
class ScheduledRun:
    """A run that has not ended. `worker` is its GPU actor, which it keeps unless that one finds no place."""

    plan: RunPlan
    committed: int = 0  # segments 0 … committed-1 are durable
    denoised: int = 0  # segments 0 … denoised-1 have latents
    worker: int | None = None
    state: RunState = "queued"
    decoded: int = field(init=False)
    encoded: int = field(init=False)
    consumed: int = 0  # segments 0 … consumed-1 were taken by a client
    in_flight: dict[Stage, Work] = field(default_factory=dict)
    failures: defaultdict[tuple[Stage, int | None], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
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

    def failed(self, stage: Stage, error: str, kind: FailureKind) -> str | None:
        """The work in flight for this stage has failed; returns why the run cannot go on, if it cannot.

        Deaths of actors have a bound of their own: most are no fault of the work that they interrupt.
        """
        segment_index = self.in_flight.pop(stage).segment_index
        counts = self.failures[stage, segment_index]
        counts[kind] += 1
        what = stage if segment_index is None else f"{stage} of segment {segment_index}"
        match kind:
            case "fatal":
                return f"{what} failed: {error}"
            case "death":
                cause = f"actors died {counts[kind]} times during this work, which may be why (is memory short?)"
                return f"{what} failed: {cause}: {error}" if counts[kind] > MOST_DEATHS else None
        failures, most = counts["error"] + counts["no place"], self.plan.retries + 1
        return f"{what} failed (attempt {failures} of {most}): {error}" if failures >= most else None

    def displaced(self, stage: Stage) -> None:
        """Its GPU actor has no place: the run waits for another one, and begins there with its preparation."""
        for again in {(stage, self.in_flight.pop(stage).segment_index), ("prepare", None)}:
            self.failures[again]["displaced"] += 1  # another attempt, whatever happened to the ones before
        self.state = "queued"

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
        attempt = self.failures.get((stage, segment_index), Counter()).total()
        assert self.worker is not None, f"{stage} of a run that has no GPU actor"
        self.in_flight[stage] = Work(
            self.plan.run_id, self.plan.incarnation, stage, segment_index, attempt, self.worker
        )
        return self.in_flight[stage]
