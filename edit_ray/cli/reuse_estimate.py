"""The reuse estimate: what a run's segments reuse of each other, from its configuration and the model's JSON files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

from edit_ray.cache.blocks import split_blocks
from edit_ray.cache.policies import WarmstartReuse, check_granularity
from edit_ray.config import Config
from edit_ray.engine.calibration import policy_of
from edit_ray.engine.model_info import read_model_info
from edit_ray.engine.reuse import branches_of, plan_from_numbers, residual_shape
from edit_ray.errors import ModelError
from edit_ray.tiers.planner import simulate
from edit_ray.tiers.reuse_plan import ReusePlan, make_reuse_plan
from edit_ray.tiers.slots import slot_bytes

# Bytes per second, measured on the host of one H200, 2026-11-22; the disk with O_DIRECT.
HOST_TO_GPU, DISK_TO_HOST, HOST_TO_DISK = 55e9, 2.2e9, 2.8e9

WINDOWS = (1, 2, 4)
MAX_ACCESSES = 50_000  # simulated in some seconds
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Choice:
    """The reuse of the run with this granularity and window if all residuals fit."""

    granularity: str | int
    window: int
    entries: int  # residuals that one segment uses
    live_bytes: int  # their slots in a tier
    written_bytes: int  # by the whole run
    read_bytes: int  # by the whole run
    saved: float  # in forwards


class ReuseEstimate:
    """The reuse of a run with a reuse window. Computing time is counted in forwards of the transformer.

    Raises:
        ModelError: the model's JSON files cannot be read.
        ValueError: the model has fewer blocks than a group of the granularity.
    """

    def __init__(self, config: Config) -> None:
        assert config.num_segments is not None, "a run that reuses anything has a number of segments"
        policy, sampling = policy_of(config.cache, config.model), config.sampling
        assert isinstance(policy, WarmstartReuse), "the configuration's checks allow no other"
        self._config, self._policy, self._num_segments = config, policy, config.num_segments
        self.model = read_model_info(config.model.path)
        self._branches = len(branches_of(sampling))
        self.shape = residual_shape(
            sampling,
            patch_size=self.model.patch_size,
            scale_factor_temporal=self.model.scale_factor_temporal,
            scale_factor_spatial=self.model.scale_factor_spatial,
            width=self.model.width,
        )
        self.size = math.prod(self.shape) * ITEM_BYTES[config.model.torch_dtype]  # bytes of one residual
        self.forwards = self._num_segments * sampling.num_inference_steps * self._branches  # without any reuse
        self._shares = self._shares_of(config.cache.granularity)

    @cached_property
    def plan(self) -> ReusePlan:
        """The plan that the segments follow within `store.disk_bytes`."""
        return self._plan_within(self._config.store.disk_bytes)

    @cached_property
    def _whole(self) -> ReusePlan:
        return self._plan_within(None)

    @property
    def live_bytes(self) -> int:
        """Bytes that a tier needs for what the fullest segment uses."""
        return _entries(self.plan) * slot_bytes(self.size)

    @property
    def needed_bytes(self) -> int:
        """As `live_bytes`, but without a limit of the disk."""
        return _entries(self._whole) * slot_bytes(self.size)

    @property
    def saved(self) -> float:
        """Forwards that the run saves."""
        reads = (read.key for segment in self.plan.segments for read in segment.reads)
        return sum(self._shares[key.expert][key.unit] for key in reads)

    @property
    def lost(self) -> float:
        """Forwards, in each segment that reuses, of the residuals that do not fit."""
        return sum(self._shares[slot.expert][slot.unit] for slot in self.plan.computed)

    @property
    def simulated_segments(self) -> int:
        most = max(2 * (self._config.cache.reuse_window + 1), MAX_ACCESSES // max(1, _entries(self.plan)))
        return min(most, self._num_segments)

    def simulated(self) -> tuple[int, int]:
        """The reads that the store finds in the host tier, and those that it loads from disk, in the first segments."""
        first, store = replace(self.plan, segments=self.plan.segments[: self.simulated_segments]), self._config.store
        counts = simulate(first, store.host_bytes, store.disk_bytes)
        return counts["tier_lookups", "host", "hit"], counts["tier_lookups", "disk", "hit"]

    def choices(self) -> Iterator[Choice]:
        """Several windows for the configured granularity and the others that the policy supports."""
        cache, size, warm = self._config.cache, self.size, self._experts[: self._policy.warm_steps]
        for granularity in dict.fromkeys(("stack", "per_block", cache.granularity)):
            try:
                check_granularity(self._policy, granularity)
            except ValueError:
                continue
            shares = self._shares_of(granularity)
            entries = self._branches * sum(len(shares[expert]) for expert in warm)
            forwards = self._branches * sum(sum(shares[expert]) for expert in warm)
            for window in sorted({*WINDOWS, cache.reuse_window}):
                # All residuals are written and read alike: one stands for all.
                unit, branches, num = {"one": [size]}, ("cond",), self._num_segments
                one = make_reuse_plan(
                    "", num, window=window, warm_steps=1, experts=["one"], unit_bytes=unit, branches=branches
                )
                live = entries * (one.needed_bytes // size) * slot_bytes(size)
                reads = sum(len(segment.reads) for segment in one.segments)
                written = entries * size * sum(len(segment.writes) for segment in one.segments)
                yield Choice(granularity, window, entries, live, written, entries * size * reads, forwards * reads)

    @cached_property
    def _experts(self) -> list[str]:
        """The expert of each step. A model with two experts needs its noise scheduler, and so torch."""
        sampling, path = self._config.sampling, self._config.model.path
        if self.model.boundary_ratio is None:
            return ["transformer"] * sampling.num_inference_steps
        import diffusers

        from edit_ray.engine.caching import loop_steps
        from edit_ray.engine.conditioning import StepSchedule
        from edit_ray.engine.loading import noise_scheduler_for
        from edit_ray.engine.model_files import locate_model

        location = locate_model(path)
        try:
            # Every noise scheduler's config has the same file name and names its class.
            loaded = diffusers.UniPCMultistepScheduler.load_config(location, subfolder="scheduler")
            noise_scheduler = getattr(diffusers, loaded["_class_name"]).from_config(loaded)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{path!r} has a noise scheduler that cannot be made: {error}") from None
        noise_scheduler = noise_scheduler_for(noise_scheduler, sampling)
        StepSchedule(sampling.num_inference_steps, sampling.sigmas).set_on(noise_scheduler)
        settings = SimpleNamespace(boundary_ratio=sampling.boundary_ratio or self.model.boundary_ratio)
        pipe = SimpleNamespace(config=settings, scheduler=noise_scheduler)
        return [step.expert for step in loop_steps(pipe, noise_scheduler)]

    def _shares_of(self, granularity: str | int) -> dict[str, list[float]]:
        """For each expert's units the share of a forward that reuse saves."""
        probe = int(self._policy.needs_first_block_probe)
        return {
            expert: [(unit.last + 1 - unit.first - probe) / blocks for unit in split_blocks(blocks, granularity)]
            for expert, blocks in self.model.num_blocks.items()
        }

    def _plan_within(self, budget: int | None) -> ReusePlan:
        return plan_from_numbers(
            "",
            self._num_segments,
            self._config.cache.reuse_window,
            self._policy,
            self._config.sampling,
            experts=self._experts,
            num_units={expert: len(units) for expert, units in self._shares.items()},
            size=self.size,
            budget=budget,
        )


def what_can_be_skipped(config: Config) -> str | None:
    """A sentence on the steps that the cache can skip at most; None without a cache."""
    cache, steps = config.cache, config.sampling.num_inference_steps
    if cache.policy == "none":
        return None
    most = policy_of(cache, config.model).most_skips(steps)
    if most <= 0:
        return f"{steps} a segment, of which {cache.policy} can skip none; cache.policy none computes the same"
    return f"{steps} a segment, of which {cache.policy} can skip {most} at most"


def what_does_not_fit(config: Config) -> str | None:
    """A sentence on the residuals that exceed `store.disk_bytes` and are computed by every segment; None if all fit."""
    capacity = config.store.disk_bytes
    if not config.cache.reuse_window or capacity is None:
        return None
    plan = ReuseEstimate(config).plan
    if not plan.computed:
        return None
    return (
        f"{len(plan.computed)} residuals ({sum(slot.size for slot in plan.computed):,} bytes) do not fit into "
        f"store.disk_bytes, {capacity:,}: every segment computes them; all of them need {plan.needed_bytes:,} bytes"
    )


def _entries(plan: ReusePlan) -> int:
    """The residuals that the fullest segment uses."""
    return max(len(segment.working) for segment in plan.segments)
