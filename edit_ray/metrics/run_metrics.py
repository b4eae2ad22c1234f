"""What the segment scheduler does, counted: it is told of each thing in one call."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from edit_ray.metrics.catalog import LABELS
from edit_ray.metrics.collect import MetricValues, SeriesId, observed, series

MOST_AT_ONCE = 1000  # records, which take about 15 ms
_TOLD = {"denoise": "denoise_s", "decode": "decode_s", "encode": "encode_s", "commit": "publish_s"}
"""Where the manifest has the seconds of a stage; those of the others belong to no segment."""

_HISTOGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    "seam_score": ("edit_ray_seam_score", {}),
    **{name: ("edit_ray_work_seconds", {"stage": stage}) for stage, name in _TOLD.items()},
}
"""The histogram of each statistic that is observed, and its labels."""

_LIMIT = 2.0**63
"""No statistic of a segment is as much; below it sums of them stay finite."""


class CommittedView(Protocol):
    """A committed segment as the manifest has it."""

    @property
    def index(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def statistics(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Standing:
    """Where a run stands that has not ended."""

    state: str
    remaining: int  # segments that are planned and not committed
    lag: int  # segments that are committed and that no client has taken


@dataclass
class _Run:
    policy: str
    counted: int
    submitted: float | None


class RunMetrics:
    """Counts committed segments from the manifest's own lines, everything else as it happens.

    So a scheduler that is started again and told of the manifest has the same counts as the one before it.
    """

    def __init__(self, values: MetricValues, clock: Callable[[], float] = time.monotonic) -> None:
        self._values, self._clock = values, clock
        self._runs: dict[str, _Run] = {}
        self._work: dict[tuple[str, str, int | None], float] = {}
        self._begun: dict[tuple[str, int | None], float] = {}  # by run and segment: its first work
        self._consumers = 0

    def opened(self, run_id: str, policy: str, counted: int, *, is_new: bool = False) -> None:
        """A run begins or goes on; `counted` of its committed segments were counted elsewhere."""
        self._runs[run_id] = _Run(policy, counted, self._clock() if is_new else None)

    def committed(self, run_id: str, records: Sequence[CommittedView], earlier: Sequence[CommittedView] = ()) -> bool:
        """The run's committed segments now, and those of `earlier` takes that others have replaced.

        Counts no more than `MOST_AT_ONCE` of them; returns whether some are left for the next call.
        """
        run = self._runs.get(run_id)
        if run is None:  # work that ends after its run
            return False
        of, first = (earlier, run.counted) if run.counted < len(earlier) else (records, run.counted - len(earlier))
        if new := of[first : first + MOST_AT_ONCE]:
            run.counted += len(new)
            for record in new:
                self._time(run_id, run, record)
            self._values.add(_counts(new, run.policy))
        return run.counted < len(earlier) + len(records)

    def ended(self, run_id: str, outcome: str) -> None:
        """A run has ended with this outcome, and nothing of it is counted any more."""
        self._values.inc("edit_ray_runs_ended_total", outcome=outcome)
        self._runs.pop(run_id, None)
        self._begun = {of: since for of, since in self._begun.items() if of[0] != run_id}

    def began(self, run_id: str, stage: str, segment_index: int | None) -> None:
        """A piece of work is being carried out."""
        now = self._work[run_id, stage, segment_index] = self._clock()
        self._begun.setdefault((run_id, segment_index), now)
        self._show_work()

    def finished(self, run_id: str, stage: str, segment_index: int | None, trouble: str | None = None) -> None:
        """It is not any more; `trouble` is why it came to nothing."""
        now = self._clock()
        seconds = max(0.0, now - self._work.pop((run_id, stage, segment_index), now))
        self._show_work()
        if trouble is not None:
            self._values.inc("edit_ray_work_failed_total", stage=stage, trouble=trouble)
            self._values.inc("edit_ray_work_lost_seconds_total", seconds, stage=stage)
        elif stage not in _TOLD:
            self._values.observe("edit_ray_work_seconds", seconds, stage=stage)

    @contextmanager
    def consumer(self) -> Iterator[None]:
        """A client waits for a segment."""
        self._consumers += 1
        self._values.set("edit_ray_stream_consumers", self._consumers)
        try:
            yield
        finally:
            self._consumers -= 1
            self._values.set("edit_ray_stream_consumers", self._consumers)

    def standing(self, runs: Sequence[Standing]) -> None:
        """Where all live runs stand now."""
        states = Counter(run.state for run in runs)
        for state in LABELS["state"]:
            self._values.set("edit_ray_runs", states[state], state=state)
        self._values.set("edit_ray_segments_remaining", sum(run.remaining for run in runs))
        self._values.set("edit_ray_stream_lag_segments", max((run.lag for run in runs), default=0))

    def _show_work(self) -> None:
        stages = Counter(stage for _, stage, _ in self._work)
        for stage in LABELS["stage"]:
            self._values.set("edit_ray_work_in_flight", stages[stage], stage=stage)

    def _time(self, run_id: str, run: _Run, record: CommittedView) -> None:
        """How long a segment took, which only the scheduler that began it can tell."""
        now = self._clock()
        if run.submitted is not None and record.index == 0:
            self._values.observe("edit_ray_first_segment_seconds", max(0.0, now - run.submitted))
        began = self._begun.pop((run_id, record.index), None)
        if began is not None:
            self._values.observe("edit_ray_segment_seconds", max(0.0, now - began))


def _counts(records: Sequence[CommittedView], policy: str) -> Mapping[SeriesId, float]:
    """What the records add to the counters."""
    counters, histograms = _counters(policy), _HISTOGRAMS
    counts: dict[SeriesId, float] = dict.fromkeys(counters.values(), 0.0)
    counts[series("edit_ray_segments_total")] = len(records)
    counts[series("edit_ray_frames_total")] = sum(record.num_frames for record in records)
    for record in records:
        for name, value in record.statistics.items():
            if not isinstance(value, (int, float)) or not 0 <= value < _LIMIT:  # a file may hold anything
                continue
            if (counter := counters.get(name)) is not None:
                counts[counter] += value
            elif (histogram := histograms.get(name)) is not None:
                for of, amount in observed(histogram[0], value, **histogram[1]).items():
                    counts[of] = counts.get(of, 0) + amount
    return counts


def _counters(policy: str) -> dict[str, SeriesId]:
    """The counter of each statistic that is added up."""
    found = {
        "reuse_wait_s": series("edit_ray_reuse_wait_seconds_total"),
        "media_bytes": series("edit_ray_media_bytes_total"),
    }
    for direction in LABELS["direction"]:
        found[f"reuse_{direction}_bytes"] = series("edit_ray_reuse_bytes_total", direction=direction)
    for branch, decision, what in product(LABELS["branch"], LABELS["decision"], ("steps", "units")):
        of = {"policy": policy, "branch": branch, "decision": decision}
        found[f"{what}_{decision}_{branch}"] = series(f"edit_ray_{what}_total", **of)
    return found
