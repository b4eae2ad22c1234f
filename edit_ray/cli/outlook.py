"""What a run's segments will reuse of each other, in figures, from its configuration and its model's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edit_ray.cache.blocks import split_blocks
from edit_ray.cache.policies import WarmstartReuse, check_granularity
from edit_ray.cache.stores.eviction import EVICTIONS
from edit_ray.cache.stores.simulate import Simulated, accesses_of, simulate
from edit_ray.config import Config
from edit_ray.engine.model_info import ModelInfo
from edit_ray.engine.reuse import branches_of, plan_from_numbers, residual_shape
from edit_ray.tiers.options import StoreOptions
from edit_ray.tiers.reuse_plan import CacheKey, ReusePlan, make_reuse_plan
from edit_ray.tiers.slots import slot_bytes

# Bytes a second, measured on the host of one H200, 2026-11-22; the disk with O_DIRECT.
HOST_TO_GPU, DISK_TO_HOST, HOST_TO_DISK = 55e9, 2.2e9, 2.8e9

WINDOWS = (1, 2, 4)
MAX_ACCESSES = 50_000  # that are simulated, which takes seconds
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Choice:
    """What a granularity and a window would make of the run if everything fitted."""

    granularity: str | int
    window: int
    entries: int  # residuals that one segment works on
    alive_bytes: int  # that they take in a tier
    written_bytes: int  # by the whole run, as below
    read_bytes: int
    saved: float  # in forwards


@dataclass(frozen=True)
class Outlook:
    """A run's reuse in figures; times of computing are in forwards."""

    shape: tuple[int, int, int]
    size: int  # bytes of one residual
    plan: ReusePlan
    alive_bytes: int  # that a tier needs for what the fullest segment works on
    needed_bytes: int  # the same, if nothing were computed for want of room
    saved: float
    lost: float  # by each segment that would have reused what is computed for want of room
    forwards: int  # of the run without any reuse
    choices: tuple[Choice, ...]
    simulated: Mapping[str, Simulated]  # by eviction policy, as if everything were planned
    simulated_segments: int


def look_ahead(config: Config, info: ModelInfo, experts: Sequence[str], policy: WarmstartReuse) -> Outlook:
    """The figures of a run with a reuse window. Pure.

    Args:
        config: Of the run.
        info: Of its model.
        experts: The expert of each step.
        policy: What reuses.

    Raises:
        ValueError: the model has fewer blocks than a group of the granularity.
    """
    store, granularity, num_segments = config.store, config.cache.granularity, _counted(config)
    shape = _shape(config, info)
    size = math.prod(shape) * ITEM_BYTES[config.model.torch_dtype]
    shares = _shares(info, granularity, policy)
    followed, whole = (followed_plan(config, info, experts, policy, budget) for budget in (store.disk_bytes, None))

    def share(key: CacheKey) -> float:
        return shares[key.expert][key.unit]

    count = max(2 * (config.cache.reuse_window + 1), MAX_ACCESSES // max(1, _entries(whole)))
    return Outlook(
        shape,
        size,
        followed,
        _entries(followed) * slot_bytes(size),
        _entries(whole) * slot_bytes(size),
        sum(share(read.key) for segment in followed.segments for read in segment.reads),
        sum(shares[slot.expert][slot.unit] for slot in followed.computed),
        num_segments * len(experts) * len(branches_of(config.sampling)),
        tuple(_choices(config, info, experts[: policy.warm_steps], policy, size)),
        _simulate(replace(whole, segments=whole.segments[:count]), store, share),
        min(count, num_segments),
    )


def followed_plan(
    config: Config, info: ModelInfo, experts: Sequence[str], policy: WarmstartReuse, budget: int | None
) -> ReusePlan:
    """The plan that the run's segments would follow with so many bytes for all that is alive."""
    return plan_from_numbers(
        "",
        _counted(config),
        config.cache.reuse_window,
        policy,
        config.sampling,
        experts=experts,
        num_units={expert: len(of) for expert, of in _shares(info, config.cache.granularity, policy).items()},
        size=math.prod(_shape(config, info)) * ITEM_BYTES[config.model.torch_dtype],
        budget=budget,
    )


def _shape(config: Config, info: ModelInfo) -> tuple[int, int, int]:
    return residual_shape(
        config.sampling,
        patch_size=info.patch_size,
        scale_factor_temporal=info.scale_factor_temporal,
        scale_factor_spatial=info.scale_factor_spatial,
        width=info.width,
    )


def _counted(config: Config) -> int:
    assert config.num_segments is not None, "a run that reuses anything has a number of segments"
    return config.num_segments


def _entries(plan: ReusePlan) -> int:
    """That the fullest segment works on."""
    return max(len(segment.working) for segment in plan.segments)


def _simulate(plan: ReusePlan, store: StoreOptions, share: Callable[[CacheKey], float]) -> dict[str, Simulated]:
    """Each eviction policy with the store's tiers, in which a place is rounded up as the CacheStore actor does it."""
    accesses = [replace(access, size=slot_bytes(access.size)) for access in accesses_of(plan, share)]
    tiers = [("host", store.host_bytes), ("disk", store.disk_bytes)]
    return {name: simulate(accesses, tiers, name, {("disk", "host"): DISK_TO_HOST}) for name in EVICTIONS.names()}


def _choices(config: Config, info: ModelInfo, warm: Sequence[str], policy: WarmstartReuse, size: int) -> list[Choice]:
    """The configured granularity and the others that the policy has a meaning for, each with several windows."""
    branches, found = len(branches_of(config.sampling)), []
    for granularity in dict.fromkeys(("stack", "per_block", config.cache.granularity)):
        try:
            check_granularity(policy, granularity)
        except ValueError:
            continue
        shares = _shares(info, granularity, policy)
        entries = branches * sum(len(shares[expert]) for expert in warm)
        forwards = branches * sum(sum(shares[expert]) for expert in warm)
        for window in sorted({*WINDOWS, config.cache.reuse_window}):
            # All residuals are alike, and so are the segments' turns with them: one stands for all.
            num, unit = _counted(config), {"one": [size]}
            one = make_reuse_plan(
                "", num, window=window, warm_steps=1, experts=["one"], unit_bytes=unit, branches=("cond",)
            )
            writes = sum(len(segment.writes) for segment in one.segments)
            reads = sum(len(segment.reads) for segment in one.segments)
            found.append(
                Choice(
                    granularity,
                    window,
                    entries,
                    entries * (one.needed_bytes // size) * slot_bytes(size),
                    entries * size * writes,
                    entries * size * reads,
                    forwards * reads,
                )
            )
    return found


def _shares(info: ModelInfo, granularity: str | int, policy: WarmstartReuse) -> dict[str, list[float]]:
    """Of each expert's units: the share of a forward that need not be computed where the unit is reused."""
    probe = int(policy.needs_first_block_probe)
    return {
        expert: [(unit.last + 1 - unit.first - probe) / blocks for unit in split_blocks(blocks, granularity)]
        for expert, blocks in info.num_blocks.items()
    }
