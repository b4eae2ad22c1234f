"""The reuse estimate: what a run's segments reuse of each other, from its configuration and the model's JSON files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

from edit_ray.cache.blocks import split_blocks
from edit_ray.cache.policies import WarmstartReuse, check_granularity
from edit_ray.cache.stores.eviction import EVICTIONS
from edit_ray.cache.stores.simulate import Simulated, accesses_of, simulate
from edit_ray.config import Config
from edit_ray.engine.calibration import policy_of
from edit_ray.engine.model_info import ModelInfo, read_model_info
from edit_ray.engine.reuse import branches_of, plan_from_numbers, residual_shape
from edit_ray.errors import ModelError
from edit_ray.tiers.reuse_plan import CacheKey, ReusePlan, make_reuse_plan
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


@dataclass(frozen=True)
class ReuseEstimate:
    """The reuse of a run; computing time is counted in forwards of the transformer."""

    model: ModelInfo
    shape: tuple[int, int, int]
    size: int  # bytes of one residual
    plan: ReusePlan
    live_bytes: int  # that a tier needs for what the fullest segment uses
    needed_bytes: int  # the same without a capacity
    saved: float
    lost: float  # by each segment that would reuse what exceeds the capacity
    forwards: int  # of the run without any reuse
    choices: tuple[Choice, ...]
    simulated: Mapping[str, Simulated]  # by eviction policy, with all residuals planned
    simulated_segments: int


def estimate_reuse(config: Config) -> ReuseEstimate:
    """The estimate for a run with a reuse window. Reads the model's JSON files only.

    Raises:
        ModelError: the model cannot be read.
        ValueError: the model has fewer blocks than a group of the granularity.
    """
    run = _ReuseNumbers(config)
    shares = run.shares(config.cache.granularity)
    planned, whole = run.plan(config.store.disk_bytes), run.plan(None)

    def share(key: CacheKey) -> float:
        return shares[key.expert][key.unit]

    count = max(2 * (config.cache.reuse_window + 1), MAX_ACCESSES // max(1, _entries(whole)))
    accesses = accesses_of(replace(whole, segments=whole.segments[:count]), share)
    accesses = [replace(access, size=slot_bytes(access.size)) for access in accesses]
    tiers = [("host", config.store.host_bytes), ("disk", config.store.disk_bytes)]
    rates = {("disk", "host"): DISK_TO_HOST}
    return ReuseEstimate(
        run.model,
        run.shape,
        run.size,
        planned,
        _entries(planned) * slot_bytes(run.size),
        _entries(whole) * slot_bytes(run.size),
        sum(share(read.key) for segment in planned.segments for read in segment.reads),
        sum(shares[slot.expert][slot.unit] for slot in planned.computed),
        run.num_segments * len(run.experts) * run.branches,
        tuple(run.choices()),
        {name: simulate(accesses, tiers, name, rates) for name in EVICTIONS.names()},
        min(count, run.num_segments),
    )


def what_does_not_fit(config: Config) -> str | None:
    """A sentence on the residuals that exceed `store.disk_bytes` and are computed by every segment; None if all fit."""
    capacity = config.store.disk_bytes
    if not config.cache.reuse_window or capacity is None:
        return None
    plan = _ReuseNumbers(config).plan(capacity)
    if not plan.computed:
        return None
    return (
        f"{len(plan.computed)} residuals ({sum(slot.size for slot in plan.computed):,} bytes) do not fit into "
        f"store.disk_bytes, {capacity:,}: every segment computes them; all of them need {plan.needed_bytes:,} bytes"
    )


class _ReuseNumbers:
    """The numbers that the reuse of a configured run depends on."""

    def __init__(self, config: Config) -> None:
        assert config.num_segments is not None, "a run that reuses anything has a number of segments"
        policy = policy_of(config.cache, config.model.path)
        assert isinstance(policy, WarmstartReuse), "the configuration's checks allow no other"
        self.config, self.policy, self.num_segments = config, policy, config.num_segments
        self.model = read_model_info(config.model.path)
        self.branches = len(branches_of(config.sampling))
        self.shape = residual_shape(
            config.sampling,
            patch_size=self.model.patch_size,
            scale_factor_temporal=self.model.scale_factor_temporal,
            scale_factor_spatial=self.model.scale_factor_spatial,
            width=self.model.width,
        )
        self.size = math.prod(self.shape) * ITEM_BYTES[config.model.torch_dtype]

    @cached_property
    def experts(self) -> list[str]:
        """The expert of each step. A model with two experts needs its noise scheduler, and so torch."""
        steps, path = self.config.sampling.num_inference_steps, self.config.model.path
        if self.model.boundary_ratio is None:
            return ["transformer"] * steps
        import diffusers

        from edit_ray.engine.caching import loop_steps
        from edit_ray.engine.loading import with_flow_shift
        from edit_ray.engine.model_files import locate_model

        location = locate_model(path)
        try:
            # Every noise scheduler's config has the same file name and names its class.
            loaded = diffusers.UniPCMultistepScheduler.load_config(location, subfolder="scheduler")
            noise_scheduler = getattr(diffusers, loaded["_class_name"]).from_config(loaded)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{path!r} has a noise scheduler that cannot be made: {error}") from None
        noise_scheduler = with_flow_shift(noise_scheduler, self.config.sampling.flow_shift)
        noise_scheduler.set_timesteps(steps)
        settings = SimpleNamespace(boundary_ratio=self.model.boundary_ratio)
        pipe = SimpleNamespace(config=settings, scheduler=noise_scheduler)
        return [step.expert for step in loop_steps(pipe, noise_scheduler)]

    def shares(self, granularity: str | int) -> dict[str, list[float]]:
        """For each expert's units the share of a forward that reuse saves."""
        probe = int(self.policy.needs_first_block_probe)
        return {
            expert: [(unit.last + 1 - unit.first - probe) / blocks for unit in split_blocks(blocks, granularity)]
            for expert, blocks in self.model.num_blocks.items()
        }

    def plan(self, budget: int | None) -> ReusePlan:
        """The plan that the segments follow with `budget` bytes for all live residuals."""
        cache = self.config.cache
        return plan_from_numbers(
            "",
            self.num_segments,
            cache.reuse_window,
            self.policy,
            self.config.sampling,
            experts=self.experts,
            num_units={expert: len(units) for expert, units in self.shares(cache.granularity).items()},
            size=self.size,
            budget=budget,
        )

    def choices(self) -> Iterator[Choice]:
        """Several windows for the configured granularity and the others that the policy supports."""
        cache, warm = self.config.cache, self.experts[: self.policy.warm_steps]
        for granularity in dict.fromkeys(("stack", "per_block", cache.granularity)):
            try:
                check_granularity(self.policy, granularity)
            except ValueError:
                continue
            shares = self.shares(granularity)
            entries = self.branches * sum(len(shares[expert]) for expert in warm)
            forwards = self.branches * sum(sum(shares[expert]) for expert in warm)
            for window in sorted({*WINDOWS, cache.reuse_window}):
                # All residuals are written and read alike: one stands for all.
                one = make_reuse_plan(
                    "",
                    self.num_segments,
                    window=window,
                    warm_steps=1,
                    experts=["one"],
                    unit_bytes={"one": [self.size]},
                    branches=("cond",),
                )
                writes = sum(len(segment.writes) for segment in one.segments)
                reads = sum(len(segment.reads) for segment in one.segments)
                yield Choice(
                    granularity,
                    window,
                    entries,
                    entries * (one.needed_bytes // self.size) * slot_bytes(self.size),
                    entries * self.size * writes,
                    entries * self.size * reads,
                    forwards * reads,
                )


def _entries(plan: ReusePlan) -> int:
    """The residuals that the fullest segment uses."""
    return max(len(segment.working) for segment in plan.segments)
