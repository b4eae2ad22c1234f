"""What the actors' parts count, in the words of the metrics' catalog and of the manifest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from edit_ray.actors.messages import RunSpec
from edit_ray.cache.records import Record
from edit_ray.cache.stores.shared_tiers import SharedTiers
from edit_ray.files import write_atomic
from edit_ray.metrics.catalog import LABELS
from edit_ray.metrics.deltas import Deltas
from edit_ray.metrics.totals import Series, Snapshot, Totals, series
from edit_ray.runs.plan import SegmentPlan

_CPU = torch.device("cpu")


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

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
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
        self._totals.observe("edit_ray_step_seconds", now - self._since, decision="skipped" if skipped else "computed")
        self._since = now


def show_memory(totals: Totals, device: torch.device = _CPU) -> None:
    """What torch holds of a CUDA device; elsewhere there is nothing to show."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        held = {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
        for kind, value in {**held, "total": total}.items():
            totals.set("edit_ray_gpu_memory_bytes", value, kind=kind)


class TierFigures:
    """The counts of all tiers that one CacheStore actor has had, one after the other."""

    def __init__(self) -> None:
        self.totals = Totals()
        self._deltas, self._looks = Deltas(), 0

    def look(self, tiers: SharedTiers | None) -> None:
        """Takes over what the tiers have counted, and what they hold; None where there are none now."""
        held: dict[Series, float] = {}
        if tiers is not None and not tiers.failed:
            told = tiers.statistics()
            self._looks += 1
            self.totals.add(self._deltas.take("tiers", Snapshot(tiers.incarnation, self._looks, _counts(told))))
            held = _held(told)
        for name in ("bytes", "budget_bytes", "peak_bytes", "entries"):
            for tier in LABELS["tier"]:
                of = series(f"edit_ray_tier_{name}", tier=tier)
                self.totals.set(of[0], held.get(of), tier=tier)


def _held(told: Mapping[str, Any]) -> dict[Series, float]:
    found: dict[Series, float] = {}
    names = {"bytes": "bytes", "budget_bytes": "budget_bytes", "peak_bytes": "peak_bytes", "entries_in": "entries"}
    for (key, name), tier in ((pair, tier) for pair in names.items() for tier in LABELS["tier"]):
        value = told[key].get(tier, 0)
        if value is not None:
            found[series(f"edit_ray_tier_{name}", tier=tier)] = value
    return found


def _counts(told: Mapping[str, Any]) -> dict[Series, float]:
    counters = told["counters"]
    host, disk, none = counters.found.get("host", 0), counters.found.get("disk", 0), counters.misses
    found: dict[Series, float] = {}

    def count(name: str, value: float, **labels: str) -> None:
        of = series(f"edit_ray_{name}_total", **labels)
        found[of] = found.get(of, 0) + value

    count("tier_lookups", host, tier="host", result="hit")
    count("tier_lookups", disk + none, tier="host", result="miss")
    count("tier_lookups", disk, tier="disk", result="hit")
    count("tier_lookups", none, tier="disk", result="miss")
    for (source, target, cause), (entries, size) in counters.moves.items():
        count("tier_moves", entries, source=source, target=target, cause=cause)
        count("tier_moved_bytes", size, source=source, target=target, cause=cause)
    for move, seconds in told["move_seconds"].items():
        count("tier_move_seconds", seconds, move=move)
    for reason, number in counters.drops.items():
        count("entries_dropped", number, reason=reason)
    refusals = {**counters.refusals, "stale_lease": told["stale_leases"], "stale_event": counters.stale}
    for refusal, number in refusals.items():
        count("refusals", number, refusal=refusal)
    for fault, number in told["faults"].items():
        count("disk_faults", number, fault=fault)
    count("prefetches_requested", counters.prefetch.requested)
    for outcome in LABELS["prefetch"]:
        count("prefetches", getattr(counters.prefetch, outcome), prefetch=outcome)
    count("prefetch_wasted_bytes", counters.prefetch.wasted_bytes)
    return found
