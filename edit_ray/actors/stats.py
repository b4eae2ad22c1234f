"""The actors' statistics, by the names of the metrics catalog and of the manifest."""

from __future__ import annotations

import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.cache.records import Record
from edit_ray.files import write_atomic
from edit_ray.metrics.catalog import LABELS
from edit_ray.metrics.collect import MetricValues, SeriesId, Snapshot, series
from edit_ray.runs.run_plan import SegmentPlan
from edit_ray.tiers.service import TierService

_CPU = torch.device("cpu")
_NONE: Mapping[SeriesId, Any] = {}


def decisions(record: Record | None, num_steps: int, guided: bool) -> dict[str, int]:
    """Steps and units of a segment that were computed and skipped, by branch.

    A step of a branch counts as skipped where all its units were reused. Without a record everything was computed.
    """
    if record is None:
        return {f"steps_computed_{branch}": num_steps for branch in ("cond", "uncond")[: 1 + guided]}
    found: dict[str, int] = defaultdict(int)
    for (branch, _), counts in record.counts("branch", "step").items():
        found[f"steps_{'computed' if counts.computed else 'skipped'}_{branch}"] += 1
        found[f"units_computed_{branch}"] += counts.computed
        found[f"units_skipped_{branch}"] += counts.skipped
    return dict(found)


def cache_statistics(record: Record | None, spec: RunSpec, segment: SegmentPlan) -> dict[str, int]:
    """What the cache computed and skipped in a segment; its decisions go into the run's folder."""
    counts = decisions(record, spec.config.sampling.num_inference_steps, segment.guidance_scale > 1)
    if record is None:
        return counts
    write_atomic(spec.folder.record(segment.index, segment.take), record.to_json().encode())
    skipped = sum(decision.decision == "reuse" for decision in record)
    return {"units_computed": len(record) - skipped, "units_skipped": skipped, **counts}


class StepTimes:
    """Times the steps of one segment as they happen."""

    def __init__(self, values: MetricValues) -> None:
        self._values = values
        self.begin()

    def begin(self) -> None:
        """The first step begins."""
        self._since, self._seen = time.perf_counter(), 0

    def step(self, record: Record | None) -> None:
        """A step is done; `record` has its decisions at its end."""
        now = time.perf_counter()
        told = () if record is None else record.decisions[self._seen :]
        self._seen += len(told)
        skipped = bool(told) and all(decision.decision == "reuse" for decision in told)
        self._values.observe("edit_ray_step_seconds", now - self._since, decision="skipped" if skipped else "computed")
        self._since = now


def show_memory(values: MetricValues, device: torch.device = _CPU) -> None:
    """What torch holds of a CUDA device; elsewhere there is nothing to show."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        held = {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
        for kind, value in {**held, "total": total}.items():
            values.set("edit_ray_gpu_memory_bytes", value, kind=kind)


class TierStats:
    """The counts of all tiers that one CacheStore actor has had, one after the other."""

    def __init__(self) -> None:
        self._life, self._sequence = secrets.token_hex(8), 0
        self._before: Counter[SeriesId] = Counter()  # of tiers that are closed, and of the actor itself
        self._tiers, self._counts, self._gauges = "", _NONE, _NONE  # of the tiers seen last, and their incarnation

    def refuse(self, refusal: str) -> None:
        """Count a call that the actor itself has refused."""
        self._before[series("edit_ray_refusals_total", refusal=refusal)] += 1

    def look(self, tiers: TierService | None) -> None:
        """Read what the tiers have counted, and what they hold; None or failed ones hold nothing."""
        self._gauges = _NONE
        if tiers is None or tiers.failed:
            return
        stats = tiers.statistics()
        if tiers.incarnation != self._tiers:
            self._before.update(self._counts)  # adds them
        self._tiers, self._counts, self._gauges = tiers.incarnation, _counts(stats), _held(stats)

    def snapshot(self, tiers: TierService | None) -> Snapshot:
        """All counts since the actor's start, and what its tiers hold now."""
        self.look(tiers)
        self._sequence += 1
        counts = self._before.copy()
        counts.update(self._counts)
        return Snapshot(self._life, self._sequence, counts, self._gauges)


def _held(told: Mapping[str, Any]) -> dict[SeriesId, float]:
    found: dict[SeriesId, float] = {}
    names = {"bytes": "bytes", "budget_bytes": "budget_bytes", "peak_bytes": "peak_bytes", "entries_in": "entries"}
    for (key, name), tier in ((pair, tier) for pair in names.items() for tier in LABELS["tier"]):
        value = told[key].get(tier, 0)
        if value is not None:
            found[series(f"edit_ray_tier_{name}", tier=tier)] = value
    return found


def _counts(told: Mapping[str, Any]) -> dict[SeriesId, float]:
    counts = dict(told["counts"])
    counts["refusals", "stale_lease"] = told["stale_leases"]
    counts |= {("tier_move_seconds", move): seconds for move, seconds in told["move_seconds"].items()}
    counts |= {("disk_faults", fault): number for fault, number in told["faults"].items()}
    return {(f"edit_ray_{name}_total", tuple(labels), ""): value for (name, *labels), value in counts.items()}
