"""The GPU actor's class in this process, with a model that is made here, beside a CacheStore actor elsewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_size import PROMPT, Task
from edit_ray.actors.denoiser import DenoiserActor
from edit_ray.actors.messages import RunSpec
from edit_ray.cache.options import CacheOptions
from edit_ray.cache.stores.memory import GPUStore
from edit_ray.config import Config
from edit_ray.engine.segment import SegmentEngine
from edit_ray.tiers.leases import Reuse, SegmentLeases, Store
from edit_ray.tiers.protocol import Op
from edit_ray.tiers.reuse_plan import Key
from edit_ray.tiers.store_client import Waits


class ReadyDenoiser(DenoiserActor):
    """A GPU actor whose model is loaded."""

    def __init__(self, store: Store, engine: SegmentEngine, config: Config) -> None:
        super().__init__(store)
        self._model.engine = engine
        self._model.loaded_for = (config.model, config.engine.cfg_parallel, type(engine))


class DeviceDenoiser(ReadyDenoiser):
    """One whose residuals all stay on the device: what tiers are compared with."""

    def _plan_leases(self, spec: RunSpec, engine: SegmentEngine, start: int) -> SegmentLeases | None:
        assert spec.num_segments is not None
        cache, sampling = spec.config.cache, spec.config.sampling
        reuse = engine.plan_reuse(spec.residuals_id, spec.num_segments, cache, sampling, None)
        return None if reuse is None else DeviceLeases(reuse)  # type: ignore[return-value]  # the same calls


class DeviceLeases:
    """In place of `SegmentLeases`: one store on the device for all segments."""

    def __init__(self, reuse: Reuse) -> None:
        self.reuse, self._store = reuse, PlannedDeviceStore(reuse)

    def lost(self, segment: int, attempt: int) -> list[int]:
        return []

    def begin(self, segment: int, attempt: int, history_len: int, then_next: bool = True) -> PlannedDeviceStore:
        self._store.begin(segment)
        return self._store

    def complete(self, segment: int, attempt: int) -> dict[str, Any]:
        nothing = {"host": 0, "disk": 0}
        return {"counts": Counter(), "bytes": nothing, "on_disk_bytes": 0, "stale_leases": 0}

    def follow(self, segment: int) -> None: ...

    def give_up(self) -> None: ...

    def free_device(self) -> None: ...

    def close(self) -> None:
        self._store.clear()


class PlannedDeviceStore(GPUStore):
    """Keeps what the plan still wants, by reference."""

    def __init__(self, reuse: Reuse) -> None:
        super().__init__()
        self._reuse = reuse
        self.begin(0)

    def begin(self, segment: int) -> None:
        """What no segment from this one on reads is dropped."""
        self.waits, self._ops = Waits(), self._reuse.ops(segment)
        segments = range(segment, len(self._reuse.plan.segments))
        wanted = {_inner(op) for later in segments for op in self._reuse.ops(later) if not op.writes}
        for key in [key for key in self.sizes() if key not in wanted]:
            self.drop(key)

    def planned_reads(self) -> list[Key]:
        """What the segment reads, in the order of use."""
        return [_inner(op) for op in self._ops if not op.writes]

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        written = any(op.writes and _inner(op) == key for op in self._ops)
        self.waits.writes += written
        self.waits.written_bytes += written * tensor.nbytes
        super().put(key, tensor)

    def get(self, key: Key) -> torch.Tensor | None:
        found = super().get(key)
        self.waits.reads += found is not None
        self.waits.read_bytes += 0 if found is None else found.nbytes
        return found

    def finish(self) -> None: ...


def _inner(op: Op) -> Key:
    """An op's key as the cache has it: without the run."""
    return op.key[1:]


def config_of(
    task: Task,
    device: str,
    num_segments: int,
    *,
    cache: CacheOptions,
    store: dict[str, Any],
    threads: int | None = None,
    model: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
) -> Config:
    """The configuration of a run of this size; `model` and `engine` add to their sections."""
    return Config.model_validate(
        {
            "model": {"torch_dtype": task.torch_dtype, "device": device} | (model or {}),
            "sampling": task.sampling.model_dump(),
            "video": {"num_segments": num_segments},
            "prompt_segments": [{"segment": 0, "prompt": PROMPT}],
            "cache": cache.model_dump(),
            "store": store,
            "engine": {"cpu_threads": threads or torch.get_num_threads(), "start_timeout_s": 300} | (engine or {}),
            "metrics": {"enabled": False},
        }
    )


def spec_of(root: Path, run_id: str, config: Config) -> RunSpec:
    """A run whose folder is there."""
    spec = RunSpec(run_id, root, config, config.num_segments)
    for name in ("latents", "segments", "records"):
        (spec.folder.path / name).mkdir(parents=True, exist_ok=True)
    return spec
